//! The environments that the shared tests run in: [`ENVIRONMENTS`] is the table, one row for each.
//!
//! A process runs in the environment that `PGLOCK_TEST_ENVIRONMENT` names, or in the plain one. Every
//! [`TestDb`](crate::TestDb) of the process then hands out connections of that environment; only
//! [`TestDb::admin`](crate::TestDb::admin) stays a direct connection of a superuser.

use std::env;
use std::sync::OnceLock;
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgConnection, PgPoolOptions};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection};
use tokio::runtime::{Builder, Runtime};

use crate::options::ServerOptions;
use crate::pgbouncer::PgBouncer;

/// The variable that names the environment of a process.
pub const VARIABLE: &str = "PGLOCK_TEST_ENVIRONMENT";

/// The role without attributes that most environments log in as.
const APP: &str = "pglock_app";

/// Creates the roles of an environment: `pglock_app` logs in, and is a member of `pglock_owner`.
const ROLES: &str = "CREATE ROLE pglock_app LOGIN; CREATE ROLE pglock_owner; \
                     GRANT pglock_owner TO pglock_app";

/// How a connection gets to the server.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Route {
    /// Through the server's unix socket.
    Direct,
    /// Over TCP, through a proxy that delays each direction by half of this round trip.
    Slow(Duration),
    /// Through a PgBouncer in session mode, with as many server connections as the pool may have.
    PgBouncer,
}

/// An environment: its differences from [`PLAIN`], and the tests that don't apply in it.
#[derive(Clone, Copy, Debug)]
pub struct Environment {
    /// The name, as in `PGLOCK_TEST_ENVIRONMENT`.
    pub name: &'static str,
    /// The role that the connections log in as. A superuser creates it, unless it is `postgres`.
    pub(crate) login: &'static str,
    /// Settings of that role: for each, the first major version that has it, the name, and the value as SQL.
    pub(crate) settings: &'static [(u32, &'static str, &'static str)],
    /// The statements that a superuser executes in each database before it is used.
    pub(crate) database: &'static [&'static str],
    /// The encoding of the database. The default is UTF-8, or what the server has.
    pub(crate) encoding: Option<&'static str>,
    pub(crate) route: Route,
    /// The capacity of sqlx's cache of prepared statements, if not the default.
    pub(crate) statement_cache: Option<usize>,
    /// A limit to the connections of a pool.
    pub(crate) max_connections: u32,
    pub(crate) test_before_acquire: bool,
    /// Statements of the pool's `after_connect` and `after_release`.
    pub(crate) after_connect: Option<&'static str>,
    pub(crate) after_release: Option<&'static str>,
    /// Whether the connections of a pool are opened on a runtime that is not the test's.
    pub(crate) other_runtime: bool,
    /// The factor by which time limits grow, because an acquire over a slow link takes several round trips.
    pub(crate) slack: u32,
    /// The factor by which tests repeat something less often, so that all environments take only minutes.
    pub(crate) fewer: usize,
    /// How many tests run at a time. Over a slow link most of them only wait.
    pub threads: usize,
    /// The tests of semaphores, elections and several locks that run in it, as parts of their paths.
    pub types: &'static [&'static str],
    /// Tests that don't apply: a part of the test's path, and the reason.
    pub except: &'static [(&'static str, &'static str)],
}

/// The environment of a process that names none: a superuser, a unix socket, default settings.
pub const PLAIN: Environment = Environment {
    name: "plain",
    login: "postgres",
    settings: &[],
    database: &[],
    encoding: None,
    route: Route::Direct,
    statement_cache: None,
    max_connections: u32::MAX,
    test_before_acquire: true,
    after_connect: None,
    after_release: None,
    other_runtime: false,
    slack: 1,
    fewer: 1,
    threads: 6,
    types: &[],
    except: &[],
};

/// All tests of semaphores, elections and several locks.
const TYPES: &[&str] = &["election::", "multi::", "semaphore::"];

/// Why the tests of a schema with its own `set_config` don't apply where the role has a search path.
const OWN_SEARCH_PATH: &str = "the test sets the search path of the database; the role's own wins";

/// The tests that do not apply in the environments with hostile overloads.
const HOSTILE: &[(&str, &str)] = &[
    ("interop::a_name_is_the_same_lock_in_sqlx", "sqlx's own lock calls unqualified functions"),
    ("loss::a_server_that_refuses_a_setting", OWN_SEARCH_PATH),
    ("loss::an_error_that_refuses_nothing", OWN_SEARCH_PATH),
    ("election::a_leader_is_seen_with_its_address", OWN_ROLES),
    ("multi::more_than_the_lock_table_takes", ROLE_NEEDS_LOCKS),
];

/// The tests of [`TYPES`] that do not apply to a role without attributes.
const AS_A_ROLE: &[(&str, &str)] = &[
    ("election::a_leader_is_seen_with_its_address", OWN_ROLES),
    ("multi::more_than_the_lock_table_takes", ROLE_NEEDS_LOCKS),
];
const OWN_ROLES: &str = "the test has roles of its own";
const ROLE_NEEDS_LOCKS: &str = "the lock table is too small for what the test asks beside";

/// Why a test of short waits does not apply to a slow link.
const LESS_THAN_A_ROUND_TRIP: &str = "the test waits for less than a round trip of the link";

/// The tests that an encoding can't influence. The other tests acquire, wait, release and fail, with keys and messages.
const ENCODING: &[(&str, &str)] = &[
    ("cancel::", TEXTS_ALONE),
    ("drop::", TEXTS_ALONE),
    ("loss::", TEXTS_ALONE),
    ("model::", TEXTS_ALONE),
    ("tokens::", TEXTS_ALONE),
    ("upgrade::", TEXTS_ALONE),
    ("::wait::", TEXTS_ALONE),
];
const TEXTS_ALONE: &str = "an encoding influences texts alone, which the other tests send and read";

/// Why a test of a setting does not apply where the role has the setting.
const OWN_LIMITS: &str = "the test sets the limit of the database; the role's own wins";

/// Why a test does not apply to a slow link.
const EVERY_POLL: &str = "the test drops a call at each poll, which takes minutes; the polls are the \
                          same on a fast link";

/// Why a test of the server's log does not apply to a role without PL/pgSQL.
const LOGS_EACH_SLICE: &str = "a slice that ends is an error in the server's log";

/// Why a test does not apply to a pool of one connection.
const NEEDS_TWO: &str = "the test needs several connections of one pool at a time";

/// A base for rows that differ from [`PLAIN`] in the connections alone.
const BASE: Environment = Environment { fewer: 10, ..PLAIN };

/// A base for rows that log in as a role without attributes.
const ROLE: Environment = Environment { login: APP, ..BASE };

/// All environments but [`PLAIN`]. A new environment is a new row.
pub const ENVIRONMENTS: &[Environment] = &[
    Environment {
        name: "set_role",
        settings: &[(12, "role", "pglock_owner")],
        types: TYPES,
        except: AS_A_ROLE,
        ..ROLE
    },
    Environment { name: "set_role_hook", after_connect: Some("SET ROLE pglock_owner"), ..ROLE },
    Environment {
        name: "hardened",
        database: &["REVOKE ALL ON pg_stat_activity, pg_locks, pg_settings FROM PUBLIC"],
        types: TYPES,
        except: AS_A_ROLE,
        ..ROLE
    },
    Environment {
        name: "no_plpgsql",
        database: &["DROP EXTENSION plpgsql"],
        except: &[
            ("wait::a_long_wait_costs_others_nothing", LOGS_EACH_SLICE),
            ("loss::a_server_that_refuses_a_setting", "the test defines a function in PL/pgSQL"),
            ("loss::an_error_that_refuses_nothing", "the test defines a function in PL/pgSQL"),
            ("loss::a_function_that_the_role", "the test defines a function in PL/pgSQL"),
        ],
        ..ROLE
    },
    Environment {
        name: "plpgsql_revoked",
        database: &["REVOKE USAGE ON LANGUAGE plpgsql FROM PUBLIC"],
        except: &[("wait::a_long_wait_costs_others_nothing", LOGS_EACH_SLICE)],
        ..ROLE
    },
    Environment {
        name: "slow_link",
        route: Route::Slow(Duration::from_millis(120)),
        slack: 5,
        fewer: 100,
        threads: 24,
        types: &[
            "election::a_leader_that_lost_its_session",
            "election::an_observer_returns_each_change",
            "election::one_leads_and_the_others_wait",
            "multi::a_bounded_wait_has_one_bound",
            "multi::a_loss_is_reported",
            "multi::what_fails_half_way",
            "semaphore::a_bounded_wait_ends_in_time",
            "semaphore::closing_the_pool",
            "semaphore::processes_are_served",
            "semaphore::the_loss_of_a_permit",
            "semaphore::a_waiter_continues",
        ],
        except: &[
            ("cancel::acquiring_", EVERY_POLL),
            ("cancel::downgrading_and_upgrading", EVERY_POLL),
            ("own_session::both::cancel::releasing", EVERY_POLL),
            ("managed::both::cancel::releasing", EVERY_POLL),
            ("wait::a_grant_that_races_with_the_timeout", LESS_THAN_A_ROUND_TRIP),
            ("wait::a_bounded_wait_ends_on_time", LESS_THAN_A_ROUND_TRIP),
        ],
        ..ROLE
    },
    Environment {
        name: "pool_of_one",
        max_connections: 1,
        types: &[
            "election::a_leader_that_lost_its_session",
            "election::an_observer_that_is_dropped",
            "election::campaigning_dropped",
            "election::running_dropped",
            "election::terms_grow",
            "multi::a_loss_is_reported",
            "multi::any_number_of_keys",
            "multi::closing_releases",
            "semaphore::all_waiters_of_a_process",
            "semaphore::a_waiter_continues_after_a_restart",
            "semaphore::a_waiter_wakes_soon_after_the_death",
        ],
        except: &[
            ("model::the_server_agrees_with_the_model", NEEDS_TWO),
            ("interop::a_name_is_the_same_lock_in_sqlx", NEEDS_TWO),
            ("interop::every_number_is_a_key", NEEDS_TWO),
            ("wait::a_long_wait_costs_others_nothing", NEEDS_TWO),
            ("own_session::both::cancel::an_upgrade_that_outlives", NEEDS_TWO),
            ("own_session::both::errors::deadlock::between_two_sharers", NEEDS_TWO),
            ("own_session::both::go_pglock::different_ids_are_independent", NEEDS_TWO),
            ("own_session::both::go_pglock::locks_held_by_one_task", NEEDS_TWO),
            ("own_session::both::go_pglock::readers_are_parallel", NEEDS_TWO),
            ("own_session::both::go_pglock::readers_wait_for_the_writer", NEEDS_TWO),
            ("own_session::both::go_pglock::three_can_share", NEEDS_TWO),
            ("own_session::both::interop::a_pair_never_clashes", NEEDS_TWO),
            ("own_session::both::interop::an_i32_is_the_i64", NEEDS_TWO),
            ("own_session::both::interop::databases_of_one_server", NEEDS_TWO),
            ("own_session::both::interop::the_order_of_a_pair", NEEDS_TWO),
            ("own_session::both::wait::waiters_within_a_slice", NEEDS_TWO),
            ("own_session::both::wait::a_grant_that_races_with_the_timeout", NEEDS_TWO),
        ],
        ..BASE
    },
    Environment { name: "no_statement_cache", statement_cache: Some(0), ..BASE },
    Environment {
        name: "no_ping",
        test_before_acquire: false,
        except: &[
            (
                "cancel::acquiring_when_the_pool_has_only_dead",
                "the pool itself lends dead connections, to the test's own queries too",
            ),
            (
                "errors::a_dead_idle_connection_is_replaced",
                "the pool was told to lend dead connections: a transient error is right",
            ),
        ],
        ..BASE
    },
    Environment {
        name: "discard_all",
        after_release: Some("DISCARD ALL"),
        except: &[
            (
                "clean::an_old_transaction_left_open",
                "DISCARD ALL fails in a transaction, and the pool closes the connection",
            ),
            (
                "interop::a_name_is_the_same_lock_in_sqlx",
                "sqlx's own lock fails after DISCARD ALL: its statements are prepared",
            ),
        ],
        ..BASE
    },
    Environment {
        name: "role_defaults",
        settings: &[
            (12, "default_transaction_isolation", "serializable"),
            (12, "statement_timeout", "'1s'"),
            (12, "lock_timeout", "'1s'"),
            (12, "idle_in_transaction_session_timeout", "'1s'"),
            (14, "idle_session_timeout", "'1s'"),
            (17, "transaction_timeout", "'1s'"),
        ],
        except: &[
            ("errors::a_wait_outlasts::statement_timeout", OWN_LIMITS),
            ("errors::a_wait_outlasts::lock_timeout", OWN_LIMITS),
            ("errors::a_wait_outlasts::idle_", OWN_LIMITS),
            ("errors::a_wait_outlasts::transaction_timeout", OWN_LIMITS),
            (
                "clean::the_pool_gets_its_settings_back_unchanged",
                "the limit on idle sessions is put back by its value, so its source changes",
            ),
        ],
        ..ROLE
    },
    Environment {
        name: "hostile_before",
        database: &[include_str!("hostile.sql")],
        settings: &[(12, "search_path", "hostile, pg_catalog")],
        types: TYPES,
        except: HOSTILE,
        ..ROLE
    },
    Environment {
        name: "hostile_behind",
        database: &[include_str!("hostile.sql")],
        settings: &[(12, "search_path", "pg_catalog, hostile")],
        except: HOSTILE,
        ..ROLE
    },
    Environment {
        name: "pgbouncer",
        route: Route::PgBouncer,
        except: &[
            (
                "errors::connecting::while_the_server_is_down",
                "PgBouncer lets clients wait for a server that is down",
            ),
            (
                "errors::waiting::fails_when_the_server_goes_away",
                "PgBouncer reports the end of the server by an error of its own",
            ),
            (
                "loss::a_server_that_refuses_a_setting",
                "what a server refuses is remembered by address, and each pool has its PgBouncer",
            ),
        ],
        ..BASE
    },
    Environment { name: "latin1", encoding: Some("LATIN1"), except: ENCODING, ..ROLE },
    Environment { name: "sql_ascii", encoding: Some("SQL_ASCII"), except: ENCODING, ..ROLE },
    Environment { name: "runtimes", other_runtime: true, types: TYPES, ..BASE },
];

impl Environment {
    /// Returns the environment of this process. Panics if `PGLOCK_TEST_ENVIRONMENT` names none.
    pub fn current() -> &'static Self {
        Self::current_or(&PLAIN)
    }

    /// Like [`current`](Self::current), but returns `default` if the variable is not set. Must be called before
    /// anything else that depends on the environment.
    pub fn current_or(default: &'static Self) -> &'static Self {
        static CURRENT: OnceLock<&Environment> = OnceLock::new();

        CURRENT.get_or_init(|| {
            let name = env::var(VARIABLE).unwrap_or_default();
            if name.is_empty() {
                return default;
            }
            if name == PLAIN.name {
                return &PLAIN;
            }
            Self::named(&name).unwrap_or_else(|| {
                let names: Vec<_> = ENVIRONMENTS.iter().map(|known| known.name).collect();
                panic!("{VARIABLE} is {name:?}; the environments are {}", names.join(", "))
            })
        })
    }

    /// Returns the row of [`ENVIRONMENTS`] with this name.
    pub fn named(name: &str) -> Option<&'static Self> {
        ENVIRONMENTS.iter().find(|known| known.name == name)
    }

    /// Returns whether this is the plain environment.
    pub fn is_plain(&self) -> bool {
        self.name == PLAIN.name
    }

    /// Returns whether a pool can have `count` connections in this environment.
    pub fn has_connections(&self, count: u32) -> bool {
        count <= self.max_connections
    }

    /// Returns a time limit for this environment: `limit` itself in the plain environment, and a longer one
    /// where the environment makes each statement slower.
    pub fn limit(&self, limit: Duration) -> Duration {
        limit * self.slack
    }

    /// Returns how often a test repeats something in this environment that it repeats `count` times in the plain one:
    /// at least twice, or once if `count` is one.
    pub fn rounds(&self, count: usize) -> usize {
        (count / self.fewer).max(count.min(2))
    }

    /// Returns whether this machine has the programs that the environment needs. If not, the test is skipped, at least
    /// in part.
    pub fn is_available(&self) -> bool {
        self.route != Route::PgBouncer || PgBouncer::find().is_some()
    }

    /// Adds the options that a server needs to be used in this environment.
    pub(crate) fn server_options(&self, options: ServerOptions) -> ServerOptions {
        if self.is_plain() {
            return options;
        }
        // Some environments open all connections of a pool at once.
        let options = options.setting("max_connections", "300");
        if matches!(self.route, Route::Slow(_)) { options.tcp() } else { options }
    }

    /// Applies the environment's options for each connection.
    pub(crate) fn connect(&self, options: PgConnectOptions) -> PgConnectOptions {
        let options = options.username(self.login);
        match self.statement_cache {
            Some(capacity) => options.statement_cache_capacity(capacity),
            None => options,
        }
    }

    /// Returns the options of a pool.
    pub(crate) fn pool_options(&self) -> PgPoolOptions {
        let mut options = PgPoolOptions::new().test_before_acquire(self.test_before_acquire);
        if let Some(statement) = self.after_connect {
            options = options.after_connect(move |conn, _| {
                Box::pin(async move { sqlx::raw_sql(statement).execute(conn).await.map(drop) })
            });
        }
        if let Some(statement) = self.after_release {
            options = options.after_release(move |conn, _| {
                Box::pin(async move { sqlx::raw_sql(statement).execute(conn).await.map(|_| true) })
            });
        }
        options
    }

    /// Prepares a server: creates the roles, and a template, of which the databases of the tests are copies.
    /// Returns the name of the template.
    pub(crate) async fn prepare(
        &self,
        server: PgConnectOptions,
        version: u32,
    ) -> Result<String, sqlx::Error> {
        let template = format!("pglock_{}", self.name);
        let mut statements = vec![match self.encoding {
            Some(encoding) => format!(
                "CREATE DATABASE {template} TEMPLATE template0 ENCODING '{encoding}' \
                 LC_COLLATE 'C' LC_CTYPE 'C'"
            ),
            None => format!("CREATE DATABASE {template} TEMPLATE template0"),
        }];
        if self.login != PLAIN.login {
            statements.push(ROLES.to_owned());
        }
        for (since, name, value) in self.settings {
            if version >= *since {
                statements.push(format!("ALTER ROLE {} SET {name} = {value}", self.login));
            }
        }
        let mut conn = server.connect().await?;
        for statement in statements {
            sqlx::raw_sql(AssertSqlSafe(statement)).execute(&mut conn).await?;
        }
        conn.close().await?;

        let mut conn = PgConnection::connect_with(&server.database(&template)).await?;
        for statement in self.database {
            sqlx::raw_sql(AssertSqlSafe(*statement)).execute(&mut conn).await?;
        }
        conn.close().await?;
        Ok(template)
    }
}

/// Returns a runtime that lives as long as the process, for work that must not depend on a test's runtime.
pub(crate) fn background() -> &'static Runtime {
    static BACKGROUND: OnceLock<Runtime> = OnceLock::new();

    BACKGROUND.get_or_init(|| {
        let mut runtime = Builder::new_multi_thread();
        runtime.worker_threads(2).thread_name("background").enable_all();
        runtime.build().expect("a runtime can be built")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_every_exception_has_a_reason() {
        for (place, row) in ENVIRONMENTS.iter().enumerate() {
            assert!(ENVIRONMENTS.iter().skip(place + 1).all(|other| other.name != row.name));
            assert!(!row.is_plain());
            for (test, reason) in row.except {
                assert!(!test.is_empty() && reason.len() > 10, "{}: {test}", row.name);
            }
        }
    }

    #[test]
    fn the_plain_environment_changes_no_limit() {
        assert_eq!(PLAIN.limit(Duration::from_secs(1)), Duration::from_secs(1));
        assert_eq!([0, 1, 50].map(|count| PLAIN.rounds(count)), [0, 1, 50]);
        assert_eq!([1, 3, 50].map(|count| BASE.rounds(count)), [1, 2, 5]);
    }
}
