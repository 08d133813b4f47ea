//! The checks, each with its advice.

use std::time::Duration;

use sqlx::PgPool;
use tokio::time::timeout;

use super::{Finding, Severity};
use crate::error::{Error, Result, chain};
use crate::lock::Lock;
use crate::options::LockOptions;
use crate::session::{DEADLINE, proof, within};
use crate::sql::doctor::{self as statements, Circumstances};

/// The oldest version that the tests run on.
const OLDEST: u32 = 120_000;

/// Fewer free connections than this are a warning. Fewer free locks are `Broken`.
const FEW: i64 = 4;

pub(super) fn primary(seen: &Circumstances) -> Finding {
    let version = seen.version;
    let number = format!("PostgreSQL {}.{}", version / 10_000, version % 10_000);
    if seen.standby {
        let finding = Finding::fine("primary", format!("a hot standby, {number}"));
        return finding
            .broken("its locks exclude no session on the primary: connect to the primary");
    }
    let finding = Finding::fine("primary", format!("a primary, {number}"));
    if version < OLDEST {
        return finding.warn("this version was not tested: use PostgreSQL 12 or later");
    }
    finding
}

pub(super) fn functions(seen: &Circumstances) -> Finding {
    let check = "functions";
    match &seen.forbidden {
        Ok(None) => Finding::fine(check, "the role may call every function that a lock needs"),
        Ok(Some(forbidden)) => Finding::fine(check, format!("not allowed: {forbidden}"))
            .broken(format!("GRANT EXECUTE ON FUNCTION {forbidden} TO {}", seen.role)),
        Err(why) => Finding::unknown(check, why, "check that the server is a PostgreSQL server"),
    }
}

/// Returns `None` if no extension was found that distributes the database over several nodes.
pub(super) fn nodes(seen: &Circumstances) -> Option<Finding> {
    let Ok(Some(extensions)) = &seen.distributed else { return None };
    let finding = Finding::fine("nodes", format!("the database has the extension {extensions}"));
    Some(finding.warn(
        "each node has a lock table of its own, and a proof through one node says nothing about \
         others: connect all processes to the same node",
    ))
}

/// Checks whether the role may use PL/pgSQL, without which nothing catches the timeout of a slice, and the server logs
/// it.
pub(super) fn plpgsql(seen: &Circumstances) -> Finding {
    let check = "plpgsql";
    match &seen.plpgsql {
        Ok(true) => Finding::fine(check, "waits write no errors to the server's log"),
        Ok(false) => Finding::fine(check, "the role can't use the language plpgsql").warn(format!(
            "each wait for a busy lock writes an error to the server's log when it starts, and \
             one for each slice that ends without the lock: CREATE EXTENSION plpgsql, or GRANT \
             USAGE ON LANGUAGE plpgsql TO {}",
            seen.role
        )),
        Err(why) => Finding::unknown(
            check,
            why,
            format!("GRANT SELECT ON {} TO {}", statements::LANGUAGES, seen.role),
        ),
    }
}

/// Checks whether the server logs waits, which it does by default from PostgreSQL 19 on.
pub(super) fn logged_waits(seen: &Circumstances) -> Finding {
    let check = "log of waits";
    match (&seen.logs_waits, &seen.may_be_quiet) {
        (Ok(true), Err(_)) => {
            let finding = Finding::fine(check, "log_lock_waits is on, and the role may not set it");
            // The log lines do no harm.
            finding.but(
                Severity::Fine,
                format!(
                    "a wait that is longer than deadlock_timeout writes a line to the server's log in each slice: \
                     GRANT SET ON PARAMETER log_lock_waits TO {} (PostgreSQL 15), or set log_lock_waits = off",
                    seen.role
                ),
            )
        }
        (Ok(_), _) => {
            Finding::fine(check, "the server does not log waits for the locks of this crate")
        }
        (Err(why), _) => {
            let advice = "check that the server is a PostgreSQL server";
            Finding::unknown(check, why, advice).but(Severity::Fine, advice)
        }
    }
}

/// Checks whether the role may list locks, its own included.
pub(super) fn lock_list(seen: &Circumstances) -> Finding {
    let check = "list of locks";
    match &seen.locks {
        Ok(_) => Finding::fine(check, "the role may list locks"),
        Err(why) => {
            Finding::fine(check, format!("the role can't list locks: {why}")).warn(format!(
                "a lock that another program unlocks on the same session is not detected as lost, \
                 readers of a manager wait for each other, and `inspect`, `pglock ls` and the observers \
                 of elections fail: GRANT EXECUTE ON FUNCTION {} TO {}",
                statements::LOCK_LIST,
                seen.role
            ))
        }
    }
}

/// Tests whether a lock that one session holds is refused to another.
pub(super) async fn exclusion(pool: &PgPool, seen: &Circumstances) -> Finding {
    let check = "exclusion";
    let elsewhere = "use a PostgreSQL server for locks";
    match timeout(DEADLINE, proof::excludes(&pool.connect_options())).await {
        Ok(Ok(true)) => Finding::fine(check, "locks exclude other sessions"),
        Ok(Ok(false)) => match engine(&seen.product) {
            Some(engine) => {
                let seen = format!("the server is {engine}, where locks exclude no other session");
                Finding::fine(check, seen).broken(elsewhere)
            }
            None => Finding::fine(
                check,
                "locks exclude no other session: the connection goes through a pooler in transaction mode or a load \
                 balancer, or the server's locks do nothing",
            )
            .broken("connect to the server directly, or through a pooler in session mode"),
        },
        // The server returned an error, for example because it lacks a function.
        Ok(Err(error)) if error.as_database_error().is_some() => {
            let refused = chain(&error);
            match engine(&seen.product) {
                Some(engine) => {
                    let seen = format!("the server is {engine}, and a lock can't be acquired: {refused}");
                    Finding::fine(check, seen).broken(elsewhere)
                }
                None => Finding::fine(check, format!("a lock can't be acquired: {refused}"))
                    .broken("remove the cause, and check that the server is a PostgreSQL server"),
            }
        }
        Ok(Err(error)) => Finding::unknown(check, &chain(&error), CONNECT_TWICE),
        Err(_) => Finding::unknown(check, "no answer within ten seconds", CONNECT_TWICE),
    }
}

const CONNECT_TWICE: &str = "let the role open two connections more than the pool has";

/// Acquires a lock, and draws a token.
pub(super) async fn token(mut lock: Lock) -> Result<Option<Finding>> {
    const LIMIT: Duration = Duration::from_secs(5);

    let guard = match lock.try_acquire_for(LIMIT).await {
        Ok(Some(guard)) => guard,
        // Another doctor holds the lock, or the error is a finding of another check.
        Ok(None)
        | Err(
            Error::NoExclusion { .. }
            | Error::OutOfLocks { .. }
            | Error::SettingsRejected { .. }
            | Error::Standby { .. },
        ) => return Ok(None),
        Err(error @ Error::Database { .. }) => {
            let seen = format!("a lock can't be acquired: {}", chain(&error));
            let advice = "remove the cause, and check that the server is a PostgreSQL server";
            return Ok(Some(Finding::fine("acquire", seen).broken(advice)));
        }
        Err(error) => return Err(error),
    };
    let token = match guard.fencing_token().await {
        Ok(token) => Finding::fine("fencing token", format!("can be drawn: {token}")),
        Err(error) => Finding::fine("fencing token", chain(&error))
            .warn("locks can be held, but elections, and the program `pglock run`, need a token"),
    };
    guard.release().await?;
    Ok(Some(token))
}

/// Returns the name of the engine, if the product name is that of a server that is not PostgreSQL.
fn engine(product: &str) -> Option<&'static str> {
    let engines = [
        ("CockroachDB", "CockroachDB"),
        ("(PGlite ", "PGlite"),
        ("-YB-", "YugabyteDB"),
        ("Redshift", "Amazon Redshift"),
    ];
    engines.into_iter().find(|(mark, _)| product.contains(mark)).map(|(_, name)| name)
}

/// Tests whether the end of a connection releases its locks. A pooler in session mode that does not reset the session
/// keeps the locks of a client that dies.
///
/// Returns `None` if the server admits no more connections, or the role may not list locks, which other checks report.
pub(super) async fn end_of_session(pool: &PgPool) -> Option<Finding> {
    let check = "end of a session";
    let options = pool.connect_options();
    let looking = within(DEADLINE, Box::pin(proof::outlives_connection(&options)));
    Some(if looking.await.ok()? {
        let seen =
            "a lock stays when its connection is closed: a pooler keeps the session as it is";
        Finding::fine(check, seen).warn(
            "the locks of a process that dies stay: set server_reset_query = DISCARD ALL (PgBouncer)",
        )
    } else {
        Finding::fine(check, "a lock is released when its connection is closed")
    })
}

/// Computes when the server closes the session of a holder whose host vanishes, and whether that holder has detected
/// the loss by then.
pub(super) fn dead_holder(
    seen: &Circumstances,
    options: &LockOptions,
    refused: Option<&sqlx::Error>,
) -> Finding {
    // The usual default of the kernel, if the server returns 0.
    let or = |name, default| match seen.setting(name) {
        0 => default,
        set => set,
    };
    if !seen.tcp {
        return Finding::fine("dead holder", "over a unix socket, one that dies is known at once");
    }
    let idle = or("tcp_keepalives_idle", 7200);
    let interval = or("tcp_keepalives_interval", 75);
    let probes = interval * or("tcp_keepalives_count", 9);
    let user_timeout = seen.setting("tcp_user_timeout") / 1000;
    // A timeout that is shorter than all probes together ends the connection before them.
    let silent = if user_timeout == 0 { probes } else { probes.min(user_timeout) };
    // An idle session is probed first. After that, the timeout counts instead of the number of probes.
    let ends = if user_timeout == 0 { idle + probes } else { user_timeout.max(idle + interval) };
    let holder = options.heartbeat.bound();
    let server = Duration::from_secs(silent.try_into().unwrap_or_default());
    let finding = Finding::fine(
        "dead holder",
        format!(
            "the holder reports the loss after {holder:?}, the server ends the session after {ends} s"
        ),
    );
    if holder >= server {
        return finding.broken(format!(
            "the server may release the lock of an unreachable holder after {silent} s, \
             before the holder detects the loss; raise tcp_keepalives_interval and \
             tcp_keepalives_count, or lower the heartbeat"
        ));
    }
    match refused {
        Some(error) => finding.warn(format!(
            "the server rejects the settings by which it would detect a dead client sooner \
             ({error}); set tcp_keepalives_idle = 3, tcp_keepalives_interval = 1 and \
             tcp_keepalives_count = 5 on the server"
        )),
        None => finding,
    }
}

pub(super) fn dead_waiter(seen: &Circumstances) -> Finding {
    let name = "client_connection_check_interval";
    let check = |seen: String| Finding::fine("dead waiter", seen);
    if seen.version < 140_000 {
        return check(format!("before PostgreSQL 14 there is no {name}")).warn(
            "a client that dies while it waits keeps its place in the queue until its slice ends: upgrade",
        );
    }
    match seen.setting(name) {
        0 => check(format!("{name} is 0, and can't be set")).warn(format!(
            "a client that dies while it waits keeps its place in the queue until its slice ends: set \
             {name} to 1s on the server, or let the role set it"
        )),
        set => check(format!("noticed after {set} ms")),
    }
}

pub(super) fn idle_session(seen: &Circumstances) -> Finding {
    let check = "idle_session_timeout";
    match seen.setting(check) {
        0 => Finding::fine(check, "no limit"),
        limit => Finding::fine(check, format!("{limit} ms; lifted while a lock is held")),
    }
}

pub(super) fn transactions(seen: &Circumstances) -> Finding {
    let check = "limits on transactions";
    let names = ["idle_in_transaction_session_timeout", "transaction_timeout"];
    let set: Vec<_> = names.into_iter().filter(|name| seen.setting(name) > 0).collect();
    if set.is_empty() {
        return Finding::fine(check, "none");
    }
    let limits = set.iter().map(|name| format!("{name} is {} ms", seen.setting(name)));
    let resets = set.iter().map(|name| format!("ALTER ROLE {} SET {name} = 0", seen.role));
    Finding::fine(check, limits.collect::<Vec<_>>().join(", ")).warn(format!(
        "the server ends a session for that, and with it all its locks: keep transactions short \
         that hold a lock, or run on a guard's connection, or {}",
        resets.collect::<Vec<_>>().join("; ")
    ))
}

pub(super) fn statements(seen: &Circumstances) -> Finding {
    /// A timeout that is shorter than this may expire on a busy server, although no statement waits for a lock.
    const SHORT: i64 = 1000;

    let check = "statement_timeout";
    match seen.setting(check) {
        0 => Finding::fine(check, "no limit"),
        limit if limit < SHORT => Finding::fine(check, format!("{limit} ms")).warn(format!(
            "a busy server may take longer to answer a heartbeat, and the lock is lost then: \
             ALTER ROLE {} SET {check} = '{SHORT}ms', or more",
            seen.role
        )),
        limit => Finding::fine(check, format!("{limit} ms; lifted while a lock is waited for")),
    }
}

pub(super) fn locks(seen: &Circumstances) -> Finding {
    let check = "lock table";
    let in_use = match &seen.locks {
        Ok(in_use) => in_use,
        Err(why) => {
            let list = statements::LOCK_LIST;
            let grant = format!("GRANT EXECUTE ON FUNCTION {list} TO {}", seen.role);
            return Finding::unknown(check, why, grant);
        }
    };
    let sessions = seen.setting("max_connections") + seen.setting("max_prepared_transactions");
    let room = seen.setting("max_locks_per_transaction") * sessions;
    let free = room - in_use;
    let finding = Finding::fine(check, format!("{in_use} of {room} locks in use"));
    if free >= room / 5 {
        return finding;
    }
    let severity = if free < FEW { Severity::Broken } else { Severity::Warning };
    finding.but(severity, "raise max_locks_per_transaction, and restart the server")
}

pub(super) fn connections(seen: &Circumstances) -> Finding {
    let check = "connections";
    let sessions = match &seen.connections {
        Ok(sessions) => *sessions,
        Err(why) => {
            let (list, limits) = (statements::SESSION_LIST, statements::LIMITS);
            let grants = format!(
                "GRANT EXECUTE ON FUNCTION {list} TO {role}, without which `inspect` and `pglock ls` \
                 fail too, and GRANT SELECT ON {limits} TO {role}",
                role = seen.role
            );
            return Finding::unknown(check, why, grants);
        }
    };
    let reserved =
        seen.setting("superuser_reserved_connections") + seen.setting("reserved_connections");
    let mut free = seen.setting("max_connections") - sessions.all;
    if !sessions.superuser {
        free -= reserved;
        let limits = [
            (sessions.role_limit, sessions.of_role),
            (sessions.database_limit, sessions.of_database),
        ];
        for (limit, used) in limits {
            if limit >= 0 {
                free = free.min(i64::from(limit) - used);
            }
        }
    }
    let finding = Finding::fine(check, format!("{free} more are free"));
    if free >= FEW {
        return finding;
    }
    finding.warn(
        "each lock that is held or waited for takes one; in addition to the pool, monitoring takes one per runtime, \
         and the proof of exclusion two for a moment: raise max_connections, or the CONNECTION LIMIT of the role or the \
         database",
    )
}

pub(super) fn rights(seen: &Circumstances) -> Finding {
    let check = "other roles";
    let role = &seen.role;
    let rights = match &seen.rights {
        Ok(rights) => *rights,
        Err(why) => {
            // Locks don't depend on these rights.
            let advice = "check that the server is a PostgreSQL server";
            return Finding::unknown(check, why, advice).but(Severity::Fine, advice);
        }
    };
    let grants = [
        (rights.sees_all, "to see which session of another role holds", statements::SEES_ALL),
        (rights.ends_all, "to end a session of another role", statements::ENDS_ALL),
    ];
    let missing: Vec<_> = grants
        .into_iter()
        .filter(|(granted, ..)| !granted)
        .map(|(_, purpose, grant)| format!("{purpose}, GRANT {grant} TO {role}"))
        .collect();
    if missing.is_empty() {
        return Finding::fine(check, format!("{role} sees and may end the sessions of others"));
    }
    // Usual, and enough for locks.
    Finding::fine(check, format!("{role} sees and may end its own sessions"))
        .but(Severity::Fine, missing.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sql::doctor::{Connections, Rights};

    fn with(settings: &[(&'static str, i64)]) -> Circumstances {
        Circumstances {
            version: 150_018,
            product: String::new(),
            role: "\"app\"".to_owned(),
            standby: false,
            tcp: true,
            settings: settings.to_vec(),
            forbidden: Ok(None),
            rights: Ok(Rights { sees_all: false, ends_all: false }),
            logs_waits: Ok(false),
            may_be_quiet: Ok(()),
            plpgsql: Ok(true),
            distributed: Ok(None),
            locks: Ok(90),
            connections: Ok(Connections {
                all: 10,
                of_role: 3,
                of_database: 5,
                superuser: false,
                role_limit: -1,
                database_limit: -1,
            }),
        }
    }

    /// A server on which no role may set the keepalives is rare, so none is started for this test.
    #[test]
    fn a_server_that_gives_up_before_the_holder_breaks_locks() {
        let refused = sqlx::Error::RowNotFound;
        for (idle, interval, count, user_timeout, refused, severity) in [
            (3, 1, 5, 8000, None, Severity::Fine),
            (0, 0, 0, 0, Some(&refused), Severity::Warning),
            (1, 1, 4, 0, Some(&refused), Severity::Broken),
            (7200, 75, 9, 4000, Some(&refused), Severity::Broken),
        ] {
            let seen = with(&[
                ("tcp_keepalives_idle", idle),
                ("tcp_keepalives_interval", interval),
                ("tcp_keepalives_count", count),
                ("tcp_user_timeout", user_timeout),
            ]);
            let found = dead_holder(&seen, &LockOptions::new(), refused);
            assert_eq!(found.severity, severity, "{found}");
        }
    }

    #[test]
    fn a_lock_table_that_is_nearly_full_is_told() {
        for (connections, severity) in
            [(100, Severity::Fine), (10, Severity::Warning), (9, Severity::Broken)]
        {
            let seen = with(&[("max_connections", connections), ("max_locks_per_transaction", 10)]);
            assert_eq!(locks(&seen).severity, severity, "{}", locks(&seen));
        }
    }

    #[test]
    fn the_tightest_limit_on_connections_counts() {
        let settings = [
            ("max_connections", 100),
            ("superuser_reserved_connections", 3),
            ("reserved_connections", 2),
        ];
        let none = Connections { superuser: false, ..with(&settings).connections.unwrap() };
        for (sessions, free) in [
            (none, 85),
            (Connections { superuser: true, role_limit: 4, ..none }, 90),
            (Connections { role_limit: 4, ..none }, 1),
            (Connections { database_limit: 7, ..none }, 2),
        ] {
            let seen = Circumstances { connections: Ok(sessions), ..with(&settings) };
            assert_eq!(connections(&seen).seen, format!("{free} more are free"));
        }
    }

    #[test]
    fn what_the_role_may_not_ask_is_a_finding() {
        let refused = || "permission denied".to_owned();
        let seen = Circumstances {
            forbidden: Err(refused()),
            rights: Err(refused()),
            plpgsql: Err(refused()),
            locks: Err(refused()),
            connections: Err(refused()),
            ..with(&[])
        };
        for check in [functions, plpgsql, locks, connections] {
            let found = check(&seen);
            assert_eq!(found.severity, Severity::Warning, "{found}");
            assert_eq!(found.seen, "cannot tell: permission denied");
        }
    }

    #[test]
    fn a_server_that_does_not_look_after_who_waits_is_told() {
        let name = "client_connection_check_interval";
        assert_eq!(dead_waiter(&with(&[(name, 1000)])).severity, Severity::Fine);
        assert_eq!(dead_waiter(&with(&[(name, 0)])).severity, Severity::Warning);
        let old = Circumstances { version: 130_023, ..with(&[]) };
        assert_eq!(dead_waiter(&old).severity, Severity::Warning);
    }
}
