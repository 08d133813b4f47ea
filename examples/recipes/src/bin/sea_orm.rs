//! Pay an invoice once with SeaORM, under a lock on SeaORM's own pool.
//!
//! SeaORM 2 is built on sqlx 0.9, as pglock is, so `get_postgres_connection_pool` returns a pool that a lock can use. A
//! held lock uses one connection of it, and a third of the pool is left to the work. SeaORM 1 is built on sqlx 0.8:
//! open a small pool of sqlx 0.9 beside it, as the recipe `diesel_async` does.

#![expect(clippy::print_stdout, reason = "an example tells what it does")]

use std::error::Error;
use std::time::Duration;

use pglock::Lock;
use pglock_testkit::TestDb;
use sea_orm::prelude::*;
use sea_orm::{ConnectOptions, Database};
use tokio::task::JoinSet;
use tokio::time::sleep;

#[expect(unreachable_pub, reason = "the macro makes public items")]
mod invoice {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "invoice")]
    pub struct Model {
        #[sea_orm(primary_key)]
        pub id: i64,
        pub paid: bool,
        /// The fencing token of the last holder that has written the row.
        pub token: i64,
    }

    #[derive(Clone, Copy, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

#[tokio::main]
async fn main() -> Result<()> {
    // A database for the recipe. Your URL comes from `std::env::var("DATABASE_URL")?`.
    let db = TestDb::new().await;

    let orm =
        Database::connect(ConnectOptions::new(db.url()).max_connections(6).to_owned()).await?;
    orm.execute_unprepared(
        "CREATE TABLE invoice (id bigint PRIMARY KEY, paid bool NOT NULL, token bigint NOT NULL);
         INSERT INTO invoice VALUES (17, false, 0)",
    )
    .await?;

    let requests: JoinSet<_> = (0..4).map(|_| pay(orm.clone(), 17)).collect();
    let paid: Vec<bool> = requests.join_all().await.into_iter().collect::<Result<_>>()?;
    assert_eq!(paid.iter().filter(|paid| **paid).count(), 1, "one request has paid");
    println!("4 requests to pay one invoice: one has charged it");
    Ok(())
}

/// Pays an invoice, unless it is paid. Returns whether this call has paid it.
async fn pay(orm: DatabaseConnection, id: i64) -> Result<bool> {
    let mut lock = Lock::new(orm.get_postgres_connection_pool(), format!("invoice-{id}"));
    let Some(guard) = lock.try_acquire_for(Duration::from_secs(5)).await? else {
        return Err("another request has been paying this invoice for five seconds".into());
    };
    let token = guard.fencing_token().await?;

    let invoice = invoice::Entity::find_by_id(id).one(&orm).await?;
    if invoice.ok_or("there is no such invoice")?.paid {
        return Ok(false);
    }
    guard.while_held(charge()).await?;

    // If the lock was lost at the last moment, and a later holder has written the row, this changes nothing.
    let written = invoice::Entity::update_many()
        .col_expr(invoice::Column::Paid, Expr::value(true))
        .col_expr(invoice::Column::Token, Expr::value(token))
        .filter(invoice::Column::Id.eq(id))
        .filter(invoice::Column::Token.lte(token))
        .exec(&orm)
        .await?;
    guard.release().await?;
    Ok(written.rows_affected == 1)
}

/// The part that needs the lock: a call to another system, which no rollback undoes.
async fn charge() {
    sleep(Duration::from_millis(50)).await;
}
