//! Checks whether locks work on a server, and what to change there.
//!
//! Use it as a start-up check, or to find out why a lock was lost. The command `pglock doctor` prints
//! the same findings.
//!
//! ```
//! use pglock::LockOptions;
//! use pglock::doctor::{Severity, examine};
//!
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
//! # let pool = pglock_testkit::pool().await;
//! for finding in examine(&pool, &LockOptions::new()).await? {
//!     if finding.severity > Severity::Fine {
//!         eprintln!("{finding}");
//!     }
//! }
//! # Ok(()) }
//! ```

mod checks;

use std::fmt;
use std::time::Instant;

use sqlx::PgPool;
use tokio::runtime::Handle;

use crate::error::{Error, Result};
use crate::key::Key;
use crate::lock::Lock;
use crate::options::LockOptions;
use crate::session::conn::Conn;
use crate::session::policy::WaitPolicy;
use crate::session::pool::lend;
use crate::session::{DEADLINE, within};
use crate::sql::{backend, doctor as statements, settings};

/// The result of one check.
///
/// # Examples
///
/// As for [`examine`].
#[derive(Clone, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Finding {
    /// The name of the check, in a few words that stay the same.
    pub check: &'static str,
    /// How bad the finding is.
    pub severity: Severity,
    /// What the check found.
    pub seen: String,
    /// What to change. `None` if there is nothing to change; for a finding that is fine, an optional improvement.
    pub advice: Option<String>,
}

/// How bad a finding is.
///
/// # Examples
///
/// ```
/// use pglock::doctor::Severity;
///
/// assert!(Severity::Fine < Severity::Warning && Severity::Warning < Severity::Broken);
/// assert_eq!(Severity::Broken.to_string(), "broken");
/// ```
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "lowercase"))]
#[non_exhaustive]
pub enum Severity {
    /// Nothing has to be changed.
    Fine,
    /// Locks exclude other sessions, with the restriction that the finding describes.
    Warning,
    /// Locks can't be acquired, or exclude no other session.
    Broken,
}

/// Examines the server behind a pool, for locks with these options.
///
/// Reads settings, privileges, and the free space for locks and connections, and acquires a lock. Sends about forty
/// statements, and opens two connections at a time outside the pool. A check that the role may not make is a finding
/// too: "cannot tell", and why.
///
/// # Cancel safety
///
/// Cancel safe: as for [`Lock::acquire`](crate::Lock::acquire).
///
/// # Errors
///
/// The errors of [`Lock::acquire`](crate::Lock::acquire), except that a server on which locks can't be
/// acquired or exclude nothing is a finding. [`Error::InvalidArgument`] if the options contradict each other.
///
/// # Panics
///
/// If called outside a tokio runtime.
///
/// # Examples
///
/// ```
/// use pglock::LockOptions;
/// use pglock::doctor::{Severity, examine};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
/// # let pool = pglock_testkit::pool().await;
/// let findings = examine(&pool, &LockOptions::new()).await?;
/// let worst = findings.iter().map(|finding| finding.severity).max();
/// assert!(worst < Some(Severity::Broken), "{findings:?}");
/// # Ok(()) }
/// ```
pub async fn examine(pool: &PgPool, options: &LockOptions) -> Result<Vec<Finding>> {
    let key = Key::from("pglock doctor");
    let lock = Lock::new(&options.on(pool)?, &key);
    let failed = |source| Error::database(&key, source);

    let pooled = lend(pool, &key, WaitPolicy::Forever, Instant::now()).await?;
    let mut conn = Conn::new(pooled, Handle::current(), None);
    let asking = within(DEADLINE, async {
        let pg = conn.pg()?;
        let refused = backend::heartbeat(pg, Some(options.keepalives)).await.err();
        // Read after the heartbeat, so that the settings are those of a session that holds a lock.
        let seen = statements::circumstances(pg).await?;
        settings::put_back(pg).await?;
        Ok((refused, seen))
    });
    let (refused, seen) = asking.await.map_err(failed)?;
    conn.give_back();

    let mut findings = vec![
        checks::primary(&seen),
        checks::functions(&seen),
        checks::plpgsql(&seen),
        checks::logged_waits(&seen),
        checks::lock_list(&seen),
    ];
    findings.extend(checks::nodes(&seen));
    // Otherwise, the checks above have reported the reason.
    if !seen.standby && !matches!(seen.forbidden, Ok(Some(_))) {
        findings.push(checks::exclusion(pool, &seen).await);
        findings.extend(checks::token(lock).await?);
    }
    findings.extend(checks::end_of_session(pool).await);
    findings.extend([
        checks::dead_holder(&seen, options, refused.as_ref()),
        checks::dead_waiter(&seen),
        checks::idle_session(&seen),
        checks::transactions(&seen),
        checks::statements(&seen),
        checks::locks(&seen),
        checks::connections(&seen),
        checks::rights(&seen),
    ]);
    Ok(findings)
}

impl Finding {
    fn fine(check: &'static str, seen: impl Into<String>) -> Self {
        Self { check, severity: Severity::Fine, seen: seen.into(), advice: None }
    }

    /// A check that could not be made, and what to change for it.
    fn unknown(check: &'static str, why: &str, advice: impl Into<String>) -> Self {
        Self::fine(check, format!("cannot tell: {why}")).warn(advice)
    }

    fn warn(self, advice: impl Into<String>) -> Self {
        self.but(Severity::Warning, advice)
    }

    fn broken(self, advice: impl Into<String>) -> Self {
        self.but(Severity::Broken, advice)
    }

    fn but(self, severity: Severity, advice: impl Into<String>) -> Self {
        Self { severity, advice: Some(advice.into()), ..self }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { check, severity, seen, advice } = self;
        write!(f, "{severity}: {check}: {seen}")?;
        match advice {
            Some(advice) => write!(f, "; {advice}"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Fine => "fine",
            Self::Warning => "warning",
            Self::Broken => "broken",
        })
    }
}
