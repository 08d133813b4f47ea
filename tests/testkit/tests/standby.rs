//! A hot standby follows its primary, and takes over.

use std::time::Duration;

use pglock_testkit::{Server, eventually};
use sqlx::{ConnectOptions, Executor, PgPool};

#[tokio::test]
async fn a_standby_follows_and_is_promoted() {
    let (primary, standby) = Server::options().start_with_standby();
    let mut writer = primary.connect_options().connect().await.unwrap();
    let mut session = standby.connect_options().connect().await.unwrap();
    session.execute("CREATE TABLE t ()").await.unwrap_err();

    writer.execute("CREATE TABLE t ()").await.unwrap();
    let readers = PgPool::connect_lazy_with(standby.connect_options());
    eventually("the table has come over", Duration::from_secs(20), || async {
        readers.execute("SELECT FROM t").await.is_ok()
    })
    .await;

    standby.promote();
    // The same session may write now, and the primary does not receive the change.
    session.execute("DROP TABLE t").await.unwrap();
    writer.execute("SELECT FROM t").await.unwrap();
}
