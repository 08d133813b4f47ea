//! The requests that the service answers.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::http::header::RETRY_AFTER;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use pglock::{Election, Error, LeaderState, LeaderStatus, Lock, LockManager};
use sqlx::PgPool;
use tokio::sync::watch;

use crate::http;

/// How long a payment may wait for another payment of the same invoice: less than a client waits for the service.
const TIMEOUT: Duration = Duration::from_secs(2);

/// How long a candidate may fail before this process is not ready.
const OUTAGE: Duration = Duration::from_secs(30);

/// The key of the election, whose leader sends reminders.
pub(crate) const POST: &str = "reminders";

#[derive(Clone)]
pub(crate) struct Service {
    pub(crate) name: String,
    pub(crate) pool: PgPool,
    pub(crate) manager: LockManager,
    pub(crate) bank: SocketAddr,
    pub(crate) status: LeaderStatus,
    pub(crate) ending: watch::Receiver<bool>,
}

pub(crate) fn router(service: Service) -> Router {
    Router::new()
        .route("/invoices/{invoice}/pay", post(pay))
        .route("/leader", get(leader))
        .route("/livez", get(async || "alive\n"))
        .route("/readyz", get(is_ready))
        .with_state(service)
}

/// Pays an invoice, if it is not paid yet. Answers 409 if another request is busy with it for too long.
///
/// If the client disconnects, this future is dropped, at any of its awaits. That leaves nothing behind: neither
/// the lock nor a place in its queue.
async fn pay(
    State(service): State<Service>,
    Path(invoice): Path<i64>,
) -> Result<(StatusCode, &'static str), Failure> {
    // The lock is on the manager, so it takes no connection of its own, and leaves the pool to the queries under it.
    let lock = Lock::new(&service.manager, format!("invoice-{invoice}"));
    // If the lock is lost, the payment is stopped before another request can begin one.
    match lock.try_run_for(TIMEOUT, service.pay(invoice)).await? {
        Some(paid) => paid,
        None => Ok((StatusCode::CONFLICT, "another request is busy with this invoice\n")),
    }
}

impl Service {
    /// Pays an invoice, under its lock.
    async fn pay(&self, invoice: i64) -> Result<(StatusCode, &'static str), Failure> {
        let paid = sqlx::query_scalar("SELECT paid FROM invoice WHERE id = $1")
            .bind(invoice)
            .fetch_optional(&self.pool)
            .await?;
        match paid {
            None => return Ok((StatusCode::NOT_FOUND, "there is no such invoice\n")),
            Some(true) => return Ok((StatusCode::OK, "it was paid before\n")),
            Some(false) => {}
        }

        // This step needs the lock, because it takes long, and no rollback undoes it. If the process dies after it,
        // the next request repeats it; the bank charges an invoice once, however often it is asked.
        let charged = http::post(self.bank, &format!("/charge/{invoice}")).await?;
        if charged.status != 200 {
            return Ok((StatusCode::BAD_GATEWAY, "the bank refuses\n"));
        }

        // If the lock was lost a moment ago, another request writes the same, which does no harm. Where that would do
        // harm, make the lock on the pool instead, and write through the guard's own connection.
        sqlx::query("UPDATE invoice SET paid = true WHERE id = $1")
            .bind(invoice)
            .execute(&self.pool)
            .await?;
        Ok((StatusCode::OK, "paid\n"))
    }
}

/// Answers which candidate leads according to the database, and whether this process leads according to its own state.
/// During a change of the leader, one can be a moment ahead of the other.
async fn leader(State(service): State<Service>) -> Result<String, Failure> {
    let leader = Election::new(&service.pool, POST).leader().await?;
    let leader = leader.map_or_else(|| "none".to_owned(), |leader| leader.name);
    let Service { name, status, .. } = service;
    Ok(format!("leader: {leader}\n{name} leads: {}\n", status.is_leader()))
}

/// Answers whether requests should be sent to this process: not after SIGTERM, and not if its candidate has failed for
/// long, because then requests will fail, too. A candidate that waits is as ready as the leader.
async fn is_ready(State(service): State<Service>) -> (StatusCode, String) {
    let reason = if *service.ending.borrow() {
        "is shutting down".to_owned()
    } else if let LeaderState::Failing { error, since, .. } = service.status.state()
        && since.elapsed() > OUTAGE
    {
        error.to_string()
    } else {
        return (StatusCode::OK, "ready\n".to_owned());
    };
    (StatusCode::SERVICE_UNAVAILABLE, reason + "\n")
}

/// Why a request failed.
enum Failure {
    Bank(io::Error),
    Database(sqlx::Error),
    Lock(Error),
}

impl IntoResponse for Failure {
    /// Answers 503 if a retry may succeed, here or at another server, and otherwise 500.
    fn into_response(self) -> Response {
        let passes = match &self {
            // A closed pool does not open again, but this server is shutting down, and others can answer.
            Self::Lock(error) => error.is_transient() || matches!(error, Error::PoolClosed { .. }),
            Self::Database(error) => matches!(error, sqlx::Error::Io(_)),
            Self::Bank(_) => true,
        };
        // The operator needs the reason, the client does not.
        eprintln!("log: {self}");
        if passes {
            let come_back = [(RETRY_AFTER, "1")];
            (StatusCode::SERVICE_UNAVAILABLE, come_back, "come back in a moment\n").into_response()
        } else {
            (StatusCode::INTERNAL_SERVER_ERROR, "something is wrong here\n").into_response()
        }
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Bank(error) => write!(f, "the bank can't be reached: {error}"),
            Self::Database(error) => write!(f, "the database failed: {error}"),
            Self::Lock(error) => error.fmt(f),
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Lock(error)
    }
}

impl From<sqlx::Error> for Failure {
    fn from(error: sqlx::Error) -> Self {
        Self::Database(error)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Bank(error)
    }
}
