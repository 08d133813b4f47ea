//! Servers start, stop, crash, hang and come back.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use pglock_testkit::{Server, Shutdown, TestDb};
use sqlx::{ConnectOptions, Connection, Executor};

async fn answers(server: &Server) -> bool {
    let Ok(mut conn) = server.connect_options().connect().await else { return false };
    conn.execute("SELECT 1").await.is_ok()
}

#[tokio::test]
async fn a_stopped_server_comes_back_with_its_data() {
    let (server, db) = TestDb::with_server().await;
    for how in [Shutdown::Smart, Shutdown::Fast, Shutdown::Immediate] {
        let before = server.postmaster_pid();
        server.stop(how);
        assert!(!answers(&server).await);
        server.restart();
        assert_ne!(server.postmaster_pid(), before);
        assert!(answers(&server).await);
    }
    db.admin().await.close().await.unwrap();
}

#[tokio::test]
async fn a_killed_server_recovers() {
    let server = Server::start();
    let mut conn = server.connect_options().connect().await.unwrap();
    server.kill();
    assert!(conn.execute("SELECT 1").await.is_err());
    assert!(!answers(&server).await);
    server.restart();
    assert!(answers(&server).await);
    assert!(server.log().contains("automatic recovery in progress"));
}

#[tokio::test]
async fn a_paused_server_keeps_its_clients_waiting() {
    let server = Server::start();
    let mut conn = server.connect_options().connect().await.unwrap();
    server.pause();
    let query = conn.execute("SELECT 1");
    let mut query = std::pin::pin!(query);
    assert!(tokio::time::timeout(Duration::from_millis(100), query.as_mut()).await.is_err());
    server.resume();
    query.await.unwrap();
}

#[tokio::test]
async fn nothing_is_left_of_a_dropped_server() {
    let preparations: [fn(&Server); 4] =
        [|_| (), Server::pause, Server::kill, |server| server.stop(Shutdown::Fast)];
    for prepare in preparations {
        // Sooner than the watchdog kills a server, or the postmaster its children, that do not end. A slow machine may
        // take longer, but not each time.
        let is_quick = (0..5).any(|_| {
            let server = Server::start();
            let (dir, pid) = (server.socket_dir().to_owned(), server.postmaster_pid());
            prepare(&server);
            let start = Instant::now();
            drop(server);
            assert!(!dir.exists());
            assert!(!Path::new("/proc").join(pid.to_string()).exists());
            start.elapsed() < Duration::from_secs(5)
        });
        assert!(is_quick);
    }
}

#[tokio::test]
async fn over_tcp_a_password_can_be_required() {
    let server = Server::options()
        .tcp()
        .setting("password_encryption", "scram-sha-256")
        .setting("application_name", "it's")
        .hba("host all postgres 127.0.0.1/32 scram-sha-256")
        .start();
    let mut admin = server.connect_options().connect().await.unwrap();
    admin.execute("ALTER USER postgres PASSWORD 'secret'").await.unwrap();

    assert!(server.tcp_options().connect().await.is_err());
    assert!(server.tcp_options().password("wrong").connect().await.is_err());
    let options = server.tcp_options().password("secret");
    assert_eq!(options.get_port(), server.port());
    let mut conn = options.connect().await.unwrap();
    let port: i32 =
        sqlx::query_scalar("SELECT inet_server_port()").fetch_one(&mut conn).await.unwrap();
    assert_eq!(port, i32::from(server.port()));
    let name: String =
        sqlx::query_scalar("SELECT reset_val FROM pg_settings WHERE name = 'wal_level'")
            .fetch_one(&mut conn)
            .await
            .unwrap();
    assert_eq!(name, "minimal");

    // The server has the same port after a restart.
    server.restart();
    options.connect().await.unwrap();
}

#[tokio::test]
async fn a_server_without_tcp_does_not_listen() {
    let server = Server::start();
    let mut conn = server.connect_options().connect().await.unwrap();
    let listen: String =
        sqlx::query_scalar("SHOW listen_addresses").fetch_one(&mut conn).await.unwrap();
    assert_eq!(listen, "");
}

#[tokio::test]
async fn a_given_setting_overrides_the_default() {
    let server = Server::options().setting("max_connections", "20").start();
    let mut conn = server.connect_options().connect().await.unwrap();
    let max: String =
        sqlx::query_scalar("SHOW max_connections").fetch_one(&mut conn).await.unwrap();
    assert_eq!(max, "20");
}

#[test]
#[should_panic(expected = "unrecognized configuration parameter \"no_such_thing\"")]
fn a_server_that_does_not_start_reports_why() {
    drop(Server::options().setting("no_such_thing", "1").start());
}

#[tokio::test]
async fn the_log_is_read_from_a_mark() {
    let server = Server::start();
    let mut conn = server.connect_options().connect().await.unwrap();
    let mark = server.log_len();
    assert!(server.log().contains("ready to accept connections"));
    assert_eq!(server.log_since(mark), "");
    assert!(conn.execute("SELECT no_such_column").await.is_err());
    assert!(server.log_since(mark).contains("no_such_column"));
    assert!(!server.log_since(server.log_len()).contains("no_such_column"));
}

#[tokio::test]
async fn every_process_of_a_paused_server_stands_still() {
    let server = Server::start();
    let mut conn = server.connect_options().connect().await.unwrap();
    let backend: i32 =
        sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut conn).await.unwrap();
    let state = |pid: &str| {
        let ps = Command::new("ps").args(["-o", "state=", "-p", pid]).output();
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"));
        match stat {
            Ok(stat) => stat.rsplit_once(") ").unwrap().1.chars().next().unwrap(),
            Err(_) => String::from_utf8(ps.unwrap().stdout).unwrap().trim().chars().next().unwrap(),
        }
    };
    let pids = [backend.to_string(), server.postmaster_pid().to_string()];
    server.pause();
    assert_eq!(pids.each_ref().map(|pid| state(pid)), ['T', 'T']);
    server.resume();
    assert!(pids.iter().all(|pid| state(pid) != 'T'));
    conn.execute("SELECT 1").await.unwrap();
}
