//! Which database the program finds: as libpq would, or none.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use pglock_testkit::{Server, ServerOptions, TestDb};
use sqlx::AssertSqlSafe;

use crate::support::{Ended, PGLOCK, Running, pglock};

/// A directory that is a home.
struct Home(PathBuf);

impl Home {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("pglock-home-{}-{name}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }

    fn file(&self, name: &str, text: &str, mode: u32) {
        let path = self.0.join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.0));
    }
}

/// Runs the program without a URL, and with these variables.
async fn with(home: &Home, args: &[&str], variables: &[(&str, &str)]) -> Ended {
    let mut command = tokio::process::Command::new(PGLOCK);
    command.args(args).env_remove("DATABASE_URL").env("HOME", &home.0).kill_on_drop(true);
    for variable in ["PGHOST", "PGPORT", "PGUSER", "PGDATABASE", "PGPASSWORD"] {
        command.env_remove(variable);
    }
    command.envs(variables.iter().copied());
    Running::start(command).finish().await
}

#[tokio::test]
async fn a_service_is_another_database() {
    let db = TestDb::new().await;
    let other = TestDb::new().await;
    let options = db.options();
    let Some(socket) = options.get_socket().and_then(|socket| socket.to_str()) else { return };
    let home = Home::new("service");
    let port = options.get_port().to_string();
    let user = options.get_username();
    let service =
        format!("[prod]\nhost={socket}\nport={port}\nuser={user}\ndbname={}\n", db.name());
    home.file(".pg_service.conf", &service, 0o644);
    home.file("other.conf", &service.replace(db.name(), other.name()), 0o644);
    let other_file = home.0.join("other.conf");
    let holder = crate::support::hold(&db, &["run", "key"]).await;

    let run = ["run", "-n", "key", "true"];
    let prod = ("PGSERVICE", "prod");
    // The service takes precedence over the variables.
    let ended = with(&home, &run, &[prod, ("PGDATABASE", other.name())]).await;
    assert_eq!(ended.code(), Some(1), "{}", ended.errors);
    let file = ("PGSERVICEFILE", other_file.to_str().unwrap());
    assert_eq!(with(&home, &run, &[prod, file]).await.code(), Some(0));
    let url = format!("postgres:///{}?service=prod", other.name());
    assert_eq!(with(&home, &run, &[("DATABASE_URL", &url)]).await.code(), Some(0));
    let ended = with(&home, &run, &[("PGSERVICE", "test")]).await;
    assert_eq!(ended.code(), Some(2));
    assert!(ended.errors.contains("service test is not defined"), "{}", ended.errors);
    // The file of the machine need not exist.
    let no_system = ("PGSYSCONFDIR", home.0.to_str().unwrap());
    let ended = with(&home, &run, &[("PGSERVICE", "test"), file, no_system]).await;
    assert_eq!(ended.code(), Some(2));
    assert!(ended.errors.contains("service test is not defined"), "{}", ended.errors);
    let missing = ("PGSERVICEFILE", "/no/such/file");
    let ended = with(&home, &run, &[prod, missing, no_system]).await;
    assert_eq!(ended.code(), Some(2));
    assert!(ended.errors.contains("service file /no/such/file: "), "{}", ended.errors);
    holder.finish().await;
}

#[tokio::test]
async fn what_is_not_supported_is_refused_by_name() {
    let home = Home::new("refused");
    for (variable, value, word) in [
        ("PGSSLMODE", "verify_full", "PGSSLMODE: sslmode=verify_full is unknown"),
        ("PGSSLMODE", "allow", "sslmode=allow is not supported"),
        ("PGSSLMODE", "verify-ca", "needs sslrootcert"),
        ("PGPORT", "54x32", "PGPORT: port=54x32 is not a number"),
        ("PGHOST", "a,b", "PGHOST: a list of hosts"),
        ("PGHOSTADDR", "localhost", "not an IP address"),
        ("PGCHANNELBINDING", "require", "PGCHANNELBINDING: channel_binding=require"),
        ("PGTARGETSESSIONATTRS", "standby", "name the primary"),
        ("PGTARGETSESSIONATTRS", "master", "is unknown"),
        ("PGREQUIREAUTH", "scram-sha-256", "require_auth=scram-sha-256 is not supported"),
        ("PGSSLCRL", "/x", "PGSSLCRL: sslcrl=/x is not supported; remove it"),
        ("PGCONNECT_TIMEOUT", "soon", "whole number of seconds"),
        ("PGCLIENTENCODING", "LATIN1", "client_encoding=LATIN1"),
        ("DATABASE_URL", "mysql://h/d", "mysql:// is not a PostgreSQL server"),
        ("DATABASE_URL", "host=h dbname=d", "looks like postgres://"),
        ("DATABASE_URL", "postgres://a,b/d", "list of hosts"),
        ("DATABASE_URL", "postgres://[", "cannot read the host and port"),
        ("DATABASE_URL", "postgres://h/d?sslmod=require", "sslmod is unknown"),
        ("DATABASE_URL", "postgres://h/d?load_balance_hosts=random", "set it to disable"),
    ] {
        let ended = with(&home, &["run", "key", "echo", "ran"], &[(variable, value)]).await;
        assert_eq!((ended.code(), &*ended.output), (Some(2), ""), "{variable}={value}");
        assert!(ended.errors.contains(word), "{}", ended.errors);
        assert_eq!(ended.errors.lines().count(), 1, "{}", ended.errors);
    }
}

#[tokio::test]
async fn a_password_file_is_read_as_by_libpq() {
    let server = Server::options().tcp().hba("host all app all scram-sha-256").start();
    let db = TestDb::on(&server).await;
    // Below version 14, a password is stored for MD5 by default.
    let statements = "SET password_encryption = 'scram-sha-256'; \
                      CREATE ROLE app LOGIN PASSWORD 'se:cret'";
    sqlx::raw_sql(AssertSqlSafe(statements)).execute(&mut db.admin().await).await.unwrap();
    let home = Home::new("password");
    let port = server.port().to_string();
    let login =
        [("PGHOST", "127.0.0.1"), ("PGPORT", &port), ("PGUSER", "app"), ("PGDATABASE", db.name())];
    let run = ["run", "key", "true"];
    let line = format!("127.0.0.1:{port}:{}:app:se\\:cret\n", db.name());
    home.file(".pgpass", &format!("# none\nother:*:*:*:wrong\n{line}"), 0o600);
    let ended = with(&home, &run, &login).await;
    assert_eq!((ended.code(), &*ended.errors), (Some(0), ""));
    // Other users could read it.
    home.file(".pgpass", &line, 0o644);
    let ended = with(&home, &run, &login).await;
    assert_eq!(ended.code(), Some(69));
    assert!(
        ended.errors.contains("chmod 600") && ended.errors.contains("0644"),
        "{}",
        ended.errors
    );
    // Without a name of the database, that is the name of the user.
    home.file("pass", "*:*:app:app:se\\:cret\n", 0o600);
    let file = home.0.join("pass");
    let variables = [&login[..3], &[("PGPASSFILE", file.to_str().unwrap())]].concat();
    let ended = with(&home, &run, &variables).await;
    assert!(ended.errors.contains("database \"app\" does not exist"), "{}", ended.errors);
}

#[tokio::test]
async fn an_ipv6_address_is_in_brackets() {
    let server = ServerOptions::listen(Server::options(), "::1").start();
    let db = TestDb::on(&server).await;
    let url = format!("postgres://postgres@[::1]:{}/{}?sslmode=disable", server.port(), db.name());
    let mut command = pglock(&db, &["run", "--url", &url, "key", "true"]);
    command.env_remove("DATABASE_URL");
    let ended = Running::start(command).finish().await;
    // A machine without IPv6 can't connect, but the URL is understood.
    assert!(matches!(ended.code(), Some(0 | 69)), "{}", ended.errors);
    assert!(ended.code() == Some(0) || ended.errors.contains("on ::1, port"), "{}", ended.errors);
}

#[tokio::test]
async fn a_standby_is_refused_where_the_primary_is_required() {
    let (_primary, standby) = Server::options().start_with_standby();
    let home = Home::new("standby");
    let options = standby.connect_options();
    let socket = options.get_socket().unwrap().to_str().unwrap();
    let port = options.get_port().to_string();
    let variables = [
        ("PGHOST", socket),
        ("PGPORT", &*port),
        ("PGUSER", "postgres"),
        ("PGDATABASE", "postgres"),
    ];
    assert_eq!(with(&home, &["ls"], &variables).await.code(), Some(0));
    let variables = [&variables[..], &[("PGTARGETSESSIONATTRS", "read-write")]].concat();
    let ended = with(&home, &["ls"], &variables).await;
    assert_eq!(ended.code(), Some(69));
    assert!(ended.errors.contains("target_session_attrs"), "{}", ended.errors);
}
