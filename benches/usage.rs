//! What a process and a server have used, by the figures of Linux.

use std::fs;
use std::time::Duration;

use sqlx::error::BoxDynError;

/// Returns the processor time that a process and its ended children have used.
pub(crate) fn cpu_of(pid: u32) -> Result<Duration, BoxDynError> {
    /// How many clock ticks a second has for Linux's `/proc`, on every machine.
    const TICKS: u64 = 100;

    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The fields come after the name of the program, which is in parentheses and may contain anything.
    let (_, fields) = stat.rsplit_once(')').ok_or("no stat")?;
    let times = fields.split_whitespace().skip(11).take(4).map(str::parse::<u64>);
    let ticks: u64 = times.collect::<Result<Vec<_>, _>>()?.into_iter().sum();
    Ok(Duration::from_millis(ticks * (1000 / TICKS)))
}

/// Returns the processor time that a server has used.
pub(crate) fn cpu_of_server(postmaster: u32) -> Result<Duration, BoxDynError> {
    let children = fs::read_to_string(format!("/proc/{postmaster}/task/{postmaster}/children"))?;
    let mut all = cpu_of(postmaster)?;
    for child in children.split_whitespace() {
        // The time of a child that has just ended is missing.
        all += cpu_of(child.parse()?).unwrap_or_default();
    }
    Ok(all)
}

/// Returns the resident memory of this process, in bytes.
pub(crate) fn resident() -> Result<f64, BoxDynError> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).ok_or("no VmRSS")?;
    let kilobytes: f64 = line.split_whitespace().nth(1).ok_or("no figure")?.parse()?;
    Ok(kilobytes * 1024.0)
}
