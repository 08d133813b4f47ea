//! A database of its own for every test.

use std::env;
use std::path::PathBuf;
use std::process;
use std::str::FromStr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgConnection, PgPool, PgPoolOptions};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection};
use tokio::runtime::Builder;
use tokio::time::timeout;

use crate::environment::{Environment, Route, background};
use crate::pgbouncer::PgBouncer;
use crate::proxy::Proxy;
use crate::server::Server;

/// How long the server may take to drop a database, at the end of a test.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Returns a pool on a database of its own, for examples and doctests. Finds or starts a server for it.
///
/// The database lives as long as the pool. Panics with all the reasons if there is no server.
///
/// # Examples
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), sqlx::Error> {
/// let pool = pglock_testkit::pool().await;
/// let one: i32 = sqlx::query_scalar("SELECT 1").fetch_one(&pool).await?;
/// assert_eq!(one, 1);
/// # Ok(())
/// # }
/// ```
pub async fn pool() -> PgPool {
    let db = TestDb::new().await;
    let options = db.options();
    // The callback of the pool keeps the database.
    let pool = PgPoolOptions::new().max_connections(10).after_connect(move |_, _| {
        let _: &TestDb = &db;
        Box::pin(async { Ok(()) })
    });
    pool.connect_with(options).await.expect("the database that was just made can be reached")
}

/// A database of its own for one test.
///
/// It is made on the server of `DATABASE_URL` if that is set, and otherwise on [`Server::shared`]. In an
/// [`Environment`] other than the plain one, it is always made on a server of the testkit, and
/// [`options`](Self::options), [`url`](Self::url) and [`pool`](Self::pool) are those of the
/// environment.
///
/// # Drop
///
/// With `DATABASE_URL`, drops the database, even if clients are still connected. On a server of the testkit,
/// nothing needs to be done, because the whole server is removed.
#[derive(Debug)]
#[must_use = "with `DATABASE_URL` the database is dropped with this"]
pub struct TestDb {
    name: String,
    url: String,
    options: PgConnectOptions,
    admin: PgConnectOptions,
    environment: &'static Environment,
    /// The directory and the port of the server's socket, which a PgBouncer uses.
    socket: Option<(PathBuf, u16)>,
    /// The proxy that `options` connect through.
    _proxy: Option<Proxy>,
    bouncer: OnceLock<PgBouncer>,
    /// How to connect to drop the database, if the testkit has to drop it.
    drop_from: Option<PgConnectOptions>,
}

impl TestDb {
    /// Makes a database on the server of `DATABASE_URL` if that is set, and otherwise on [`Server::shared`].
    pub async fn new() -> Self {
        let url = env::var("DATABASE_URL").ok().filter(|url| !url.is_empty());
        // An environment creates roles, which outlive a database.
        let Some(url) = url.filter(|_| Environment::current().is_plain()) else {
            return Self::on(Server::shared()).await;
        };
        let server = PgConnectOptions::from_str(&url).expect("DATABASE_URL is understood");
        let name = create(&server, "template0").await;
        let options = server.clone().database(&name);
        Self {
            url: with_database(&url, &name),
            admin: options.clone(),
            options,
            environment: Environment::current(),
            socket: None,
            _proxy: None,
            bouncer: OnceLock::new(),
            drop_from: Some(server),
            name,
        }
    }

    /// Makes a database, and a pool on it for this number of locks.
    pub async fn with_pool(locks: u32) -> (Self, PgPool) {
        let db = Self::new().await;
        let pool = db.pool(locks).await;
        (db, pool)
    }

    /// Makes a database, a pool on it for this number of locks, and a superuser's connection to look at the locks with.
    pub async fn scene(locks: u32) -> (Self, PgPool, PgConnection) {
        let (db, pool) = Self::with_pool(locks).await;
        let admin = db.admin().await;
        (db, pool, admin)
    }

    /// Starts a server for one test alone, and makes a database on it.
    pub async fn with_server() -> (Server, Self) {
        let server = Server::start();
        let db = Self::on(&server).await;
        (server, db)
    }

    /// Makes a database on `server`.
    pub async fn on(server: &Server) -> Self {
        Self::in_environment(Environment::current(), server).await
    }

    async fn in_environment(environment: &'static Environment, server: &Server) -> Self {
        let admin = server.connect_options();
        let name = create(&admin, server.template(environment).await).await;
        let admin = admin.database(&name);
        let (proxy, options) = match environment.route {
            Route::Direct | Route::PgBouncer => (None, environment.connect(admin.clone())),
            Route::Slow(round_trip) => {
                let proxy = background().spawn(Proxy::to(server.port()));
                let proxy = proxy.await.expect("a proxy listens");
                proxy.delay(round_trip / 2);
                let options = server.tcp_options().database(&name).port(proxy.address().port());
                (Some(proxy), environment.connect(options))
            }
        };
        let url = if environment.is_plain() {
            let socket = percent_encode(server.socket_dir().as_os_str().as_encoded_bytes());
            let port = server.port();
            format!("postgres://postgres@localhost:{port}/{name}?host={socket}&sslmode=disable")
        } else {
            options.to_url_lossy().to_string()
        };
        Self {
            url,
            options,
            admin,
            environment,
            socket: Some((server.socket_dir().to_owned(), server.port())),
            _proxy: proxy,
            bouncer: OnceLock::new(),
            drop_from: None,
            name,
        }
    }

    /// Returns the options to connect to the database.
    pub fn options(&self) -> PgConnectOptions {
        match self.environment.route {
            Route::Direct | Route::Slow(_) => self.options.clone(),
            // The PgBouncer is large enough for any pool that the test makes.
            Route::PgBouncer => self.through(self.bouncer.get_or_init(|| self.start_bouncer(50))),
        }
    }

    /// Returns [`options`](Self::options) as a URL, for other programs.
    pub fn url(&self) -> String {
        match self.environment.route {
            Route::Direct | Route::Slow(_) => self.url.clone(),
            Route::PgBouncer => self.options().to_url_lossy().to_string(),
        }
    }

    /// The database's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns a pool on the database that has room for `locks` locks at once. A third of its connections, rounded
    /// up, is left to queries, unless the pool has only one.
    pub async fn pool(&self, locks: u32) -> PgPool {
        let others = if locks > 1 { locks.div_ceil(2) } else { 0 };
        let max_connections = (locks + others).min(self.environment.max_connections);
        let mut pool = self.pool_options().max_connections(max_connections);
        let mut options = self.options.clone();
        if self.environment.route == Route::PgBouncer {
            let bouncer = self.start_bouncer(max_connections);
            options = self.through(&bouncer);
            // The callback of the pool keeps the PgBouncer, which ends with the pool.
            pool = pool.after_connect(move |_, _| {
                let _: &PgBouncer = &bouncer;
                Box::pin(async { Ok(()) })
            });
        }
        if self.environment.other_runtime {
            let connecting = connect_all(pool, options);
            return background().spawn(connecting).await.expect("the connections are opened");
        }
        pool.connect_with(options).await.expect("the test's database can be reached")
    }

    /// The options of a pool that the test connects by itself, with [`options`](Self::options).
    pub fn pool_options(&self) -> PgPoolOptions {
        self.environment.pool_options()
    }

    /// Opens a superuser's connection to the database, outside any pool and directly to the server.
    pub async fn admin(&self) -> PgConnection {
        self.admin.connect().await.expect("the test's database can be reached")
    }

    /// Panics if there is no PgBouncer on this machine, because the whole process runs in this environment.
    fn start_bouncer(&self, connections: u32) -> PgBouncer {
        let (dir, port) = self.socket.as_ref().expect("an environment has a server of our own");
        let size = connections.to_string();
        let settings = [("pool_mode", "session"), ("default_pool_size", size.as_str())];
        let bouncer = PgBouncer::in_front_of(dir, *port, &settings);
        bouncer.expect("this environment is behind a PgBouncer")
    }

    fn through(&self, bouncer: &PgBouncer) -> PgConnectOptions {
        self.environment.connect(bouncer.connect_options().database(&self.name))
    }
}

/// Returns a pool whose connections were all opened on this runtime.
async fn connect_all(pool: PgPoolOptions, options: PgConnectOptions) -> PgPool {
    let connections = pool.get_max_connections();
    let pool = pool.connect_with(options).await.expect("the test's database can be reached");
    let mut opened = Vec::new();
    for _ in 0..connections {
        opened.push(pool.acquire().await.expect("the test's database can be reached"));
    }
    for mut conn in opened {
        conn.return_to_pool().await;
    }
    pool
}

impl Drop for TestDb {
    fn drop(&mut self) {
        let Some(server) = self.drop_from.take() else { return };
        let name = self.name.clone();
        // A thread with a runtime of its own, because the current runtime may be about to end.
        let dropping = thread::spawn(move || {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            let dropped = async { timeout(TIMEOUT, drop_database(&server, &name)).await };
            Ok::<_, sqlx::Error>(runtime.block_on(dropped))
        });
        // Best effort: a database left behind is no reason for a test to fail.
        drop(dropping.join());
    }
}

/// Makes a database with a name that is free, as a copy of `template`.
async fn create(server: &PgConnectOptions, template: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);

    let mut conn = server.connect().await.expect("the server lets us in");
    loop {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("pglock_test_{}_{number}", process::id());
        // A session on the template would make the statement fail, but there is none.
        // Files are copied faster than pages are written and logged, which is the default since PostgreSQL 15.
        let strategy =
            if conn.server_version_num() >= Some(150_000) { "STRATEGY file_copy" } else { "" };
        let create = format!("CREATE DATABASE {name} TEMPLATE {template} {strategy}");
        match sqlx::raw_sql(AssertSqlSafe(create)).execute(&mut conn).await {
            Ok(_) => {
                conn.close().await.expect("the server says goodbye");
                return name;
            }
            // The database is another run's, whose process has the same process ID on another machine.
            Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some("42P04") => {}
            Err(error) => panic!("cannot make the test's database: {error}"),
        }
    }
}

async fn drop_database(server: &PgConnectOptions, name: &str) -> Result<(), sqlx::Error> {
    let mut conn = server.connect().await?;
    let force = if conn.server_version_num() >= Some(130_000) {
        " WITH (FORCE)"
    } else {
        sqlx::query("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1")
            .bind(name)
            .execute(&mut conn)
            .await?;
        ""
    };
    let drop = format!("DROP DATABASE {name}{force}");
    sqlx::raw_sql(AssertSqlSafe(drop)).execute(&mut conn).await?;
    conn.close().await
}

/// Returns `url` with another database of the same server.
fn with_database(url: &str, name: &str) -> String {
    let (scheme, rest) = url.split_once("://").unwrap_or(("postgres", url));
    let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
    let authority = place.split_once('/').map_or(place, |(authority, _)| authority);
    let query: Vec<_> = query.split('&').filter(|pair| !pair.starts_with("dbname=")).collect();
    let query = query.join("&");
    let mark = if query.is_empty() { "" } else { "?" };
    format!("{scheme}://{authority}/{name}{mark}{query}")
}

fn percent_encode(bytes: &[u8]) -> String {
    let encode = |byte: &u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' => {
            char::from(*byte).to_string()
        }
        other => format!("%{other:02X}"),
    };
    bytes.iter().map(encode).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use sqlx::Row;
    use tokio::task::JoinSet;

    use super::*;
    use crate::environment::ENVIRONMENTS;

    /// The environments that the server can see, each with a statement that follows two prepared queries, and a part
    /// of its answer or of its error.
    const SEEN: [(&str, &str, &str); 15] = [
        ("set_role", "SELECT session_user || ' ' || current_user", "pglock_app pglock_owner"),
        ("set_role_hook", "SELECT session_user || ' ' || current_user", "pglock_app pglock_owner"),
        ("hardened", "SELECT mode FROM pg_locks", "permission denied for view pg_locks"),
        ("no_plpgsql", "DO $$ BEGIN END $$", "language \"plpgsql\" does not exist"),
        ("plpgsql_revoked", "DO $$ BEGIN END $$", "permission denied for language plpgsql"),
        ("slow_link", "SELECT current_user::text", "pglock_app"),
        ("pool_of_one", "SELECT 'one'", "one"),
        // sqlx prepares the same query again each time.
        ("no_statement_cache", "SELECT count(*)::text FROM pg_prepared_statements", "2"),
        ("discard_all", "SELECT count(*)::text FROM pg_prepared_statements", "0"),
        ("role_defaults", "SELECT current_setting('lock_timeout')", "1s"),
        ("hostile_before", "SELECT now()", "called hostile.now()"),
        ("hostile_behind", "SELECT pg_advisory_lock(1)", "hostile.pg_advisory_lock(integer)"),
        ("pgbouncer", "SELECT inet_server_addr() IS NULL || ''", "true"),
        ("latin1", "SELECT current_setting('server_encoding')", "LATIN1"),
        ("sql_ascii", "SELECT current_setting('server_encoding')", "SQL_ASCII"),
    ];

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn each_environment_is_what_its_row_says() {
        let mut rows = JoinSet::new();
        for (name, statement, expected) in SEEN {
            let row = Environment::named(name).unwrap();
            if row.is_available() {
                rows.spawn(is_what_it_says(row, statement, expected));
            }
        }
        while let Some(ended) = rows.join_next().await {
            ended.unwrap();
        }
        let unseen = ["no_ping", "runtimes"];
        for row in ENVIRONMENTS {
            let seen = SEEN.iter().any(|(name, ..)| *name == row.name);
            assert!(seen || unseen.contains(&row.name), "{} is not tested", row.name);
        }
    }

    async fn is_what_it_says(row: &'static Environment, statement: &'static str, expected: &str) {
        let name = row.name;
        let server = row.server_options(Server::options()).start();
        let db = TestDb::in_environment(row, &server).await;
        let two = db.pool(2).await;
        assert_eq!(two.options().get_max_connections(), 3.min(row.max_connections), "{name}");
        assert_eq!(two.options().get_test_before_acquire(), row.test_before_acquire, "{name}");
        // All statements are on one connection, which is released before the last one.
        let pool = db.pool(1).await;
        let mut conn = pool.acquire().await.unwrap();
        for _ in 0..2 {
            sqlx::query("SELECT 1::pg_catalog.int4").execute(&mut *conn).await.unwrap();
        }
        drop(conn);
        let started = Instant::now();
        let answer = sqlx::raw_sql(AssertSqlSafe(statement)).fetch_one(&pool).await;
        let took = started.elapsed();
        let seen = match answer {
            Ok(row) => row.get::<String, _>(0),
            Err(error) => error.to_string(),
        };
        assert!(seen.contains(expected), "{name}: {seen}");
        if let Route::Slow(round_trip) = row.route {
            assert!(took >= round_trip, "{name}: {took:?}");
        }
        let admin = sqlx::query_scalar::<_, String>("SHOW is_superuser");
        assert_eq!(admin.fetch_one(&mut db.admin().await).await.unwrap(), "on", "{name}");
        let mut conn = PgConnectOptions::from_str(&db.url()).unwrap().connect().await.unwrap();
        sqlx::raw_sql("SELECT 1").execute(&mut conn).await.unwrap();
    }

    #[test]
    fn only_the_database_of_a_url_is_replaced() {
        for (url, expected) in [
            ("postgres://u:p@h:1/old", "postgres://u:p@h:1/new"),
            ("postgresql://h", "postgresql://h/new"),
            ("postgres://h/old?sslmode=disable", "postgres://h/new?sslmode=disable"),
            ("postgres:///old?host=/tmp&dbname=older", "postgres:///new?host=/tmp"),
            ("postgres://h?dbname=older", "postgres://h/new"),
        ] {
            assert_eq!(with_database(url, "new"), expected);
        }
    }

    #[test]
    fn a_path_is_encoded_as_one_value() {
        assert_eq!(percent_encode(b"/tmp/a b&c"), "%2Ftmp%2Fa%20b%26c");
    }
}
