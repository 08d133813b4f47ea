//! One process of the service, from its start to its end.

use std::env;
use std::io;
use std::process;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

#[cfg(feature = "metrics")]
use pglock::LockOptions;
use pglock::{Election, Leadership, Lock, LockManager};
use sqlx::PgPool;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use tokio::net::TcpListener;
use tokio::signal::ctrl_c;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::sleep;

use crate::Result;
use crate::bank::Bank;
use crate::service::{self, POST, Service};

/// The size of the pool: one connection is for the election, some are for locks, and the others for queries. Payments
/// that wait for the bank need none.
pub(crate) const CONNECTIONS: u32 = 6;

/// For how many seconds the server accepts requests after SIGTERM, unless the variable sets another number. Kubernetes
/// removes a pod from its services while it sends the signal, and not before.
const DRAIN: &str = "5";
pub(crate) const DRAIN_VARIABLE: &str = "DRAIN_SECONDS";

/// Serves until SIGTERM or Ctrl-C. Then completes the requests that are in flight, and leaves nothing behind.
pub(crate) async fn serve(address: &str) -> Result<()> {
    #[cfg(feature = "metrics")]
    let metrics = crate::metrics::router()?;
    let name = env::var("NODE").unwrap_or_else(|_| format!("web-{}", process::id()));
    let options = PgConnectOptions::from_str(&env::var("DATABASE_URL")?)?.application_name(&name);
    let pool = PgPoolOptions::new()
        .max_connections(CONNECTIONS)
        // A request that gets no connection in this time is answered with 503.
        .acquire_timeout(Duration::from_secs(2))
        .connect_with(options)
        .await?;
    create_tables(&pool).await?;

    // Without `BANK`, the server opens a bank of its own that charges every invoice.
    let (bank, _own) = if let Ok(address) = env::var("BANK") {
        (address.parse()?, None)
    } else {
        let own = Bank::open().await?;
        (own.address(), Some(own))
    };
    #[cfg(not(feature = "metrics"))]
    let election = Election::new(&pool, POST);
    #[cfg(feature = "metrics")]
    // The key gets time series of its own, by which alerts distinguish elections.
    let election = Election::new(&LockOptions::new().label_metrics_by_key().on(&pool)?, POST);
    let mut election = election.candidate(&name);
    let status = election.status();
    let (end, ending) = watch::channel(false);
    let router = service::router(Service {
        name: name.clone(),
        pool: pool.clone(),
        manager: LockManager::new(&pool),
        bank,
        status,
        ending: ending.clone(),
    });
    #[cfg(feature = "metrics")]
    let router = router.merge(metrics);

    let drain = env::var(DRAIN_VARIABLE).unwrap_or_else(|_| DRAIN.to_owned());
    let drain = Duration::from_secs(drain.parse()?);
    let mut terminate = signal(SignalKind::terminate())?;
    let listener = TcpListener::bind(address).await?;
    println!("{name} listens on {}", listener.local_addr()?);

    tokio::try_join!(
        async {
            tokio::select! {
                _ = terminate.recv() => {}
                interrupted = ctrl_c() => interrupted?,
            }
            end.send_replace(true);
            io::Result::Ok(())
        },
        // Accepts no more clients after the drain time, and ends when all requests are answered.
        async {
            let told = told(ending.clone());
            let drained = async move {
                told.await;
                sleep(drain).await;
            };
            axum::serve(listener, router).with_graceful_shutdown(drained).await
        },
        // Resigns when it is time to end, so that another candidate leads at once.
        async {
            let lead = |leadership| lead(name.clone(), leadership);
            let run = election.run(told(ending.clone()), lead);
            Box::pin(run).await.map_err(io::Error::other)
        },
    )?;

    // Waits until the locks of clients that have disconnected are released.
    pool.close().await;
    Ok(())
}

/// Waits until it is time to end.
async fn told(mut ending: watch::Receiver<bool>) {
    // An error means that the sender was dropped, which means the same.
    drop(ending.wait_for(|ending| *ending).await);
}

/// Creates the tables that do not exist yet, under a lock, because all servers may start at once.
async fn create_tables(pool: &PgPool) -> Result<()> {
    let guard = Lock::new(pool, "create-tables").acquire().await?;
    sqlx::raw_sql(
        "CREATE TABLE IF NOT EXISTS invoice
             (id bigint PRIMARY KEY, paid bool NOT NULL DEFAULT false, reminded_by text)",
    )
    .execute(&mut *guard.connection().await?)
    .await?;
    Ok(guard.release().await?)
}

/// Does the work of the leader. The future is dropped when the leadership is lost, or when it is time to end.
async fn lead(name: String, leadership: Arc<Leadership>) -> Result<()> {
    loop {
        sleep(Duration::from_millis(200)).await;
        if let Err(error) = remind(&name, &leadership).await {
            // Returning ends the term. The next term, here or elsewhere, has a new session.
            eprintln!("{name} can't send reminders: {error}");
            return Err(error);
        }
    }
}

/// Sends a reminder for each invoice that is not paid, once.
async fn remind(name: &str, leadership: &Leadership) -> Result<()> {
    let remind = "UPDATE invoice SET reminded_by = $1 WHERE NOT paid AND reminded_by IS NULL";
    sqlx::query(remind).bind(name).execute(&mut *leadership.connection().await?).await?;
    Ok(())
}
