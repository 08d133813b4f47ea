//! A database of its own for every test.

use std::env;
use std::process;
use std::str::FromStr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgConnection, PgPool, PgPoolOptions};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection};
use tokio::runtime::Builder;
use tokio::time::timeout;

use crate::server::Server;

/// How long the server may take to drop a database, at the end of a test.
const PATIENCE: Duration = Duration::from_secs(10);

/// A pool on a database of its own, on a server found or started. For examples and doctests.
///
/// The database lives as long as the pool. Panics with the whole story when there is no server.
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
    // The pool keeps what its callback keeps: the database.
    let pool = PgPoolOptions::new().max_connections(10).after_connect(move |_, _| {
        let _: &TestDb = &db;
        Box::pin(async { Ok(()) })
    });
    pool.connect_with(options).await.expect("the database that was just made can be reached")
}

/// A database of its own for one test.
///
/// It is made on the server of `DATABASE_URL`, or else on [`Server::shared`].
///
/// # Drop
///
/// With `DATABASE_URL`, drops the database, whoever is still connected. On a server of our own
/// nothing needs to be done: it goes away whole.
#[derive(Debug)]
#[must_use = "with `DATABASE_URL` the database is dropped with this"]
pub struct TestDb {
    name: String,
    url: String,
    options: PgConnectOptions,
    /// Where to connect to drop the database, if that is for us to do.
    drop_from: Option<PgConnectOptions>,
}

impl TestDb {
    /// Makes a database on the server of `DATABASE_URL`, or else on [`Server::shared`].
    pub async fn new() -> Self {
        let Some(url) = env::var("DATABASE_URL").ok().filter(|url| !url.is_empty()) else {
            return Self::on(Server::shared()).await;
        };
        let server = PgConnectOptions::from_str(&url).expect("DATABASE_URL is understood");
        let name = create(&server).await;
        Self {
            url: with_database(&url, &name),
            options: server.clone().database(&name),
            drop_from: Some(server),
            name,
        }
    }

    /// Makes a database on `server`.
    pub async fn on(server: &Server) -> Self {
        let options = server.connect_options();
        let name = create(&options).await;
        let socket = percent_encode(server.socket_dir().as_os_str().as_encoded_bytes());
        let port = server.port();
        let url =
            format!("postgres://postgres@localhost:{port}/{name}?host={socket}&sslmode=disable");
        Self { url, options: options.database(&name), drop_from: None, name }
    }

    /// How to connect to the database.
    pub fn options(&self) -> PgConnectOptions {
        self.options.clone()
    }

    /// The same as a URL, for other programs.
    pub fn url(&self) -> String {
        self.url.clone()
    }

    /// The database's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A pool on the database.
    pub async fn pool(&self, max_connections: u32) -> PgPool {
        let pool = PgPoolOptions::new().max_connections(max_connections);
        pool.connect_with(self.options()).await.expect("the test's database can be reached")
    }

    /// A connection to the database, outside any pool.
    pub async fn admin(&self) -> PgConnection {
        self.options.connect().await.expect("the test's database can be reached")
    }
}

impl Drop for TestDb {
    fn drop(&mut self) {
        let Some(server) = self.drop_from.take() else { return };
        let name = self.name.clone();
        // A thread with a runtime of its own, as ours may be about to end.
        let dropping = thread::spawn(move || {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            let dropped = async { timeout(PATIENCE, drop_database(&server, &name)).await };
            Ok::<_, sqlx::Error>(runtime.block_on(dropped))
        });
        // Best effort: a database left behind is no reason for a test to fail.
        drop(dropping.join());
    }
}

/// Makes a database with a name that is free.
async fn create(server: &PgConnectOptions) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);

    let mut conn = server.connect().await.expect("the server lets us in");
    loop {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("pglock_test_{}_{number}", process::id());
        // Nobody can be connected to template0, which would be in the way.
        let create = format!("CREATE DATABASE {name} TEMPLATE template0");
        match sqlx::raw_sql(AssertSqlSafe(create)).execute(&mut conn).await {
            Ok(_) => {
                conn.close().await.expect("the server says goodbye");
                return name;
            }
            // Somebody else's, whose process has our number on another machine.
            Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some("42P04") => {}
            Err(error) => panic!("cannot make the test's database: {error}"),
        }
    }
}

async fn drop_database(server: &PgConnectOptions, name: &str) -> Result<(), sqlx::Error> {
    let mut conn = server.connect().await?;
    let version: i32 = sqlx::query_scalar("SELECT current_setting('server_version_num')::int")
        .fetch_one(&mut conn)
        .await?;
    let force = if version >= 130_000 {
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

/// `url`, to another database of the same server.
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
    use super::*;

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
