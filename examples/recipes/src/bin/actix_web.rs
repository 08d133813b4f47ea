//! Serialise requests per invoice in actix-web, and stop without leaving a payment half done.
//!
//! Every worker of actix-web is a runtime of its own, and in a graceful stop, a worker without requests ends first. The
//! connections that were opened on it end too, with their locks. So the locks of one `LockManager` that all workers
//! share, and the work under them, run on the runtime of `main`. A busy invoice is answered with 409, and a transient
//! error with 503, as in the cookbook.

#![expect(clippy::print_stdout, reason = "an example tells what it does")]

use std::error::Error;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use actix_web::http::header::RETRY_AFTER;
use actix_web::web::{Data, Path, post};
use actix_web::{App, HttpResponse, HttpServer};
use pglock::Error::PoolClosed;
use pglock::{Lock, LockManager};
use pglock_testkit::TestDb;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::runtime::Handle;
use tokio::task::JoinSet;
use tokio::time::sleep;

/// The state that the workers share.
struct Shared {
    manager: LockManager,
    runtime: Handle,
}

/// The number of payments that are running, all of the same invoice.
static RUNNING: AtomicU32 = AtomicU32::new(0);

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    // A database for the recipe. Your pool comes from `PgPool::connect(&url).await?`.
    // A database for the recipe. Yours has a pool from `PgPool::connect(&url).await?`.
    let db = TestDb::new().await;
    let pool = db.pool(4).await;

    let shared = Data::new(Shared { manager: LockManager::new(&pool), runtime: Handle::current() });
    let data = Data::clone(&shared);
    let app = move || App::new().app_data(data.clone()).route("/pay/{invoice}", post().to(pay));
    let server = HttpServer::new(app).workers(2).disable_signals().bind(("127.0.0.1", 0))?;
    let address = server.addrs().first().copied().ok_or("the server has no address")?;
    let server = server.run();
    let handle = server.handle();
    let serving = JoinSet::from_iter([server]);

    // Requests of one invoice, on both workers, take turns.
    let requests: JoinSet<_> = (0..4).map(|_| request(address, 17)).collect();
    let statuses: Vec<u16> = requests.join_all().await.into_iter().collect::<io::Result<_>>()?;
    assert_eq!(statuses, [200; 4]);

    // Another instance is busy with the invoice for longer than a request waits.
    let elsewhere = Lock::new(&pool, "invoice-17").acquire().await?;
    assert_eq!(request(address, 17).await?, 409);
    assert_eq!(request(address, 18).await?, 200);
    elsewhere.release().await?;

    // The server answers the request that is in flight, and then stops. Only then is the pool closed.
    let (last, ()) = tokio::join!(request(address, 17), async {
        while RUNNING.load(Ordering::Relaxed) == 0 {
            sleep(Duration::from_millis(5)).await;
        }
        handle.stop(true).await;
    });
    assert_eq!(last?, 200, "a graceful stop waits for the payment");
    for served in serving.join_all().await {
        served?;
    }
    pool.close().await;
    assert_eq!(pay(shared, Path::from(17)).await.status(), 503, "another instance can answer");
    println!("4 requests to pay one invoice took turns; a busy invoice was 409");
    Ok(())
}

async fn pay(shared: Data<Shared>, invoice: Path<i64>) -> HttpResponse {
    let lock = Lock::new(&shared.manager, format!("invoice-{invoice}"));
    // If the client disconnects, the task continues, so the payment is not left half done.
    let payment = async move { lock.try_run_for(Duration::from_secs(2), charge()).await };
    match shared.runtime.spawn(payment).await {
        Ok(Ok(Some(()))) => HttpResponse::Ok().body("paid\n"),
        Ok(Ok(None)) => HttpResponse::Conflict().body("another request is paying this invoice\n"),
        // A closed pool does not open again, but another instance can answer.
        Ok(Err(error)) if error.is_transient() || matches!(error, PoolClosed { .. }) => {
            HttpResponse::ServiceUnavailable().insert_header((RETRY_AFTER, "1")).finish()
        }
        Ok(Err(_)) | Err(_) => HttpResponse::InternalServerError().finish(),
    }
}

/// The work under the lock.
async fn charge() {
    let others = RUNNING.fetch_add(1, Ordering::Relaxed);
    assert_eq!(others, 0, "no two payments run at the same time");
    sleep(Duration::from_millis(50)).await;
    RUNNING.fetch_sub(1, Ordering::Relaxed);
}

/// Sends a request, and returns the status of the answer.
async fn request(address: SocketAddr, invoice: i64) -> io::Result<u16> {
    let mut stream = TcpStream::connect(address).await?;
    let head =
        format!("POST /pay/{invoice} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    let status = answer.get("HTTP/1.1 ".len()..).and_then(|rest| rest.get(..3)?.parse().ok());
    status.ok_or_else(|| io::Error::other(format!("no answer: {answer:?}")))
}
