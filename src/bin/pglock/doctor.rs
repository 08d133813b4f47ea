//! `pglock doctor`: checks whether locks exclude other sessions on a server.

use clap::Args;
use pglock::LockOptions;
use pglock::doctor::{Finding, Severity, examine};
use serde_json::json;

use crate::connection::{CLOSING, close_pool};
use crate::database::DatabaseArgs;
use crate::exit::{Exit, Failure, print};

/// Check whether locks exclude other sessions on a server, and what to change there
///
/// Looks for a standby, a pooler in transaction mode, settings that end sessions, missing privileges, and
/// how many locks and connections are free; and acquires a lock, to see that it can be done.
#[derive(Args, Debug)]
#[command(after_long_help = MORE)]
pub(crate) struct DoctorArgs {
    /// Print an array of findings, with check, severity, seen and advice
    #[arg(long)]
    json: bool,
}

const MORE: &str = "\
Exit codes:
   0  all is fine
   1  there are warnings: locks work, but with a limit
   2  something is broken: locks can't be acquired, or would exclude nothing;
      or the command line or the environment is wrong
  69  the database can't be reached, or failed";

pub(crate) async fn run(args: &DoctorArgs, database: DatabaseArgs) -> Result<Exit, Failure> {
    let pool = database.database("pglock doctor")?.pool(None).await?;
    let findings = examine(&pool, &LockOptions::new()).await;
    close_pool(pool, CLOSING).await;
    let findings = findings?;
    let text = if args.json { format!("{:#}\n", json!(findings)) } else { as_lines(&findings) };
    print(text.as_bytes())?;
    let worst = findings.iter().map(|finding| finding.severity).max();
    Ok(Exit::Code(match worst {
        Some(Severity::Broken) => 2,
        Some(Severity::Warning) => 1,
        Some(_) | None => 0,
    }))
}

fn as_lines(findings: &[Finding]) -> String {
    let mut lines = Vec::new();
    let width = findings.iter().map(|finding| finding.check.len()).max().unwrap_or_default();
    for Finding { check, severity, seen, advice, .. } in findings {
        lines.push(format!("{severity:7}  {check:width$}  {seen}\n"));
        lines.extend(advice.as_ref().map(|advice| format!("{:7}  {:width$}  {advice}\n", "", "")));
    }
    lines.concat()
}
