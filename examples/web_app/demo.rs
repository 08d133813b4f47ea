//! Two servers, one database, and clients that get in each other's way.
//!
//! The demo does not depend on which client is faster, because the bank makes requests wait until all are in place.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use pglock_testkit::{TestDb, advisory_locks};
use sqlx::PgPool;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::Result;
use crate::bank::Bank;
use crate::http::{self, Answer};
use crate::process::Process;
use crate::server::CONNECTIONS;

/// How long an expected event may take on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(20);

pub(crate) async fn play() -> Result<()> {
    let started = Instant::now();
    let db = TestDb::new().await;
    let url = db.url();
    let bank = Bank::open().await?;
    let (one, two) = tokio::try_join!(
        Process::start("web-1", &url, bank.address()),
        Process::start("web-2", &url, bank.address()),
    )?;
    for server in [&one, &two] {
        println!("{} listens on {}", server.name, server.address);
    }

    let demo = Demo { pool: db.pool(2).await, bank };
    let (leader, other) = demo.one_leads(one, two).await?;
    demo.one_at_a_time(&leader, &other).await?;
    demo.who_comes_second_finds_it_paid(&leader, &other).await?;
    demo.locks_take_no_connections(&other).await?;
    demo.the_lock_is_lost(&other).await?;
    demo.clients_hang_up(&leader, &other).await?;
    demo.the_leader_is_shut_down(leader, &other).await?;
    demo.the_last_is_shut_down(other).await?;
    println!(
        "\nAll that was said was checked, and is so. {:.1} s",
        started.elapsed().as_secs_f64()
    );
    Ok(())
}

struct Demo {
    /// The demo's own connections, for a look into the database.
    pool: PgPool,
    bank: Bank,
}

impl Demo {
    /// Waits until one server is elected. Returns the leader, then the other one.
    async fn one_leads(&self, one: Process, two: Process) -> Result<(Process, Process)> {
        title("One leads, and both name the same");
        let asked = Instant::now();
        loop {
            let (by_one, by_two) = tokio::try_join!(one.leader(), two.leader())?;
            ensure!(!(by_one.1 && by_two.1), "both say that they lead");
            let agreed = by_one.0 == by_two.0 && by_one.1 != by_two.1;
            if agreed {
                let (leader, other) = if by_one.1 { (one, two) } else { (two, one) };
                ensure!(
                    by_one.0 == leader.name,
                    "{} is named, but {} leads",
                    by_one.0,
                    leader.name
                );
                tokio::try_join!(leader.probes(200), other.probes(200))?;
                println!("GET /leader: {}, say both; {} says that it leads", by_one.0, leader.name);
                #[cfg(feature = "metrics")]
                tokio::try_join!(
                    leader.exports(r#"pglock_leader{key="reminders"} 1"#),
                    other.exports(r#"pglock_leader{key="reminders"} 0"#)
                )?;
                return Ok((leader, other));
            }
            ensure!(asked.elapsed() < TIMEOUT, "no leader yet: {by_one:?}, {by_two:?}");
            sleep(Duration::from_millis(20)).await;
        }
    }

    async fn one_at_a_time(&self, one: &Process, two: &Process) -> Result<()> {
        title("Eight clients pay one invoice at once, at both servers, and the bank is slow");
        self.invoices(&[1]).await?;
        self.bank.is_busy(true);
        let mut clients = JoinSet::new();
        for server in [one, two].repeat(4) {
            clients.spawn(pay(server.address, 1));
        }
        self.bank.until_asking(1, &[1]).await?;

        // The bank does not answer before these clients have their answers.
        for _ in 0..7 {
            let answer = next(&mut clients).await?;
            ensure!(answer.status == 409, "not 409: {} {}", answer.status, answer.body);
        }
        println!("7 times 409 Conflict: another request was busy with it for all of 2 s");
        self.bank.is_busy(false);
        let paid = next(&mut clients).await?;
        ensure!(paid.status == 200 && paid.body == "paid\n", "{} {}", paid.status, paid.body);
        println!("1 time 200 OK: {}", paid.body.trim());
        self.was_charged_once(1)?;

        let later = one.pay(1).await?;
        ensure!(later.status == 200 && later.body == "it was paid before\n", "{}", later.body);
        let unknown = one.pay(999).await?;
        ensure!(unknown.status == 404, "an invoice that is not there: {}", unknown.status);
        Ok(())
    }

    async fn who_comes_second_finds_it_paid(&self, one: &Process, two: &Process) -> Result<()> {
        title("Another client waits for the first, and not for too long");
        self.invoices(&[2]).await?;
        self.bank.is_busy(true);
        let mut clients = JoinSet::new();
        clients.spawn(pay(one.address, 2));
        self.bank.until_asking(1, &[2]).await?;
        clients.spawn(pay(two.address, 2));
        self.until_locks("the second waits in the queue", 2, 2).await?;
        self.bank.is_busy(false);

        let mut bodies = Vec::new();
        while !clients.is_empty() {
            let answer = next(&mut clients).await?;
            ensure!(answer.status == 200, "not 200: {} {}", answer.status, answer.body);
            bodies.push(answer.body);
        }
        bodies.sort_unstable();
        ensure!(bodies == ["it was paid before\n", "paid\n"], "{bodies:?}");
        println!("200 OK for both: the one paid, the other found it paid");
        self.was_charged_once(2)
    }

    async fn locks_take_no_connections(&self, server: &Process) -> Result<()> {
        title("More invoices are paid at once than the server has connections");
        let invoices: Vec<i64> = (101..=120).collect();
        ensure!(invoices.len() > CONNECTIONS as usize, "{CONNECTIONS} connections are enough");
        self.invoices(&invoices).await?;
        self.bank.is_busy(true);
        let mut clients = JoinSet::new();
        for &invoice in &invoices {
            clients.spawn(pay(server.address, invoice));
        }
        self.bank.until_asking(invoices.len(), &invoices).await?;
        self.until_locks("all of them are locked", invoices.len() + 1, 1).await?;
        server.leader().await?;
        println!("{} invoices are locked, and queries are answered", invoices.len());

        self.bank.is_busy(false);
        while !clients.is_empty() {
            let answer = next(&mut clients).await?;
            ensure!(answer.body == "paid\n", "{} {}", answer.status, answer.body);
        }
        for invoice in invoices {
            self.was_charged_once(invoice)?;
        }
        println!("all are paid");
        Ok(())
    }

    async fn the_lock_is_lost(&self, server: &Process) -> Result<()> {
        title("The server's session is ended in the middle of a payment");
        self.invoices(&[21]).await?;
        self.bank.is_busy(true);
        let mut clients = JoinSet::new();
        clients.spawn(pay(server.address, 21));
        self.bank.until_asking(1, &[21]).await?;

        // Once the locks of the answered requests are released, the server holds no other lock, because it does not
        // lead.
        self.until_locks("it has released the invoices before", 2, 1).await?;
        let ended: Vec<bool> = sqlx::query_scalar(
            "SELECT pg_terminate_backend(pid) FROM pg_locks JOIN pg_stat_activity USING (pid)
             WHERE locktype = 'advisory' AND granted AND application_name = $1",
        )
        .bind(server.name)
        .fetch_all(&self.pool)
        .await?;
        ensure!(ended == [true], "one session held the lock: {ended:?}");
        let lost = next(&mut clients).await?;
        ensure!(lost.status == 503, "not 503: {} {}", lost.status, lost.body);
        ensure!(lost.header("Retry-After").is_some(), "it does not say when to come back");
        self.bank.until_asking(0, &[21]).await?;
        println!("503 Service Unavailable: the lock was lost, so the payment was stopped");
        #[cfg(feature = "metrics")]
        server.exports(r#"pglock_losses_total{reason="disconnected"} 1"#).await?;

        self.bank.is_busy(false);
        let again = server.pay(21).await?;
        ensure!(again.body == "paid\n", "{} {}", again.status, again.body);
        println!("the client comes back: 200 OK");
        self.was_charged_once(21)
    }

    async fn clients_hang_up(&self, one: &Process, two: &Process) -> Result<()> {
        title("Clients hang up, one that is being served and one that waits");
        self.invoices(&[31]).await?;
        self.bank.is_busy(true);
        let mut served = JoinSet::new();
        served.spawn(pay(one.address, 31));
        self.bank.until_asking(1, &[31]).await?;
        let mut waits = JoinSet::new();
        waits.spawn(pay(two.address, 31));
        self.until_locks("the second waits in the queue", 2, 2).await?;

        waits.shutdown().await;
        self.until_locks("the second has left the queue", 2, 1).await?;
        served.shutdown().await;
        self.until_locks("the first has released it", 1, 1).await?;
        self.bank.until_asking(0, &[31]).await?;
        self.bank.is_busy(false);
        ensure!(self.bank.account(31).answered == 0, "it was charged without a client");
        println!("neither has left anything behind: no lock, no place in the queue");
        Ok(())
    }

    async fn the_leader_is_shut_down(&self, leader: Process, other: &Process) -> Result<()> {
        title("The leader gets SIGTERM, in the middle of a payment");
        self.invoices(&[41]).await?;
        self.until_reminded(41, leader.name).await?;
        self.bank.is_busy(true);
        let mut clients = JoinSet::new();
        clients.spawn(pay(leader.address, 41));
        self.bank.until_asking(1, &[41]).await?;
        leader.terminate().await?;

        let told = Instant::now();
        while other.leader().await? != (other.name.to_owned(), true) {
            ensure!(told.elapsed() < TIMEOUT, "{} does not become leader", other.name);
            sleep(Duration::from_millis(5)).await;
        }
        println!("{} ms later, {} leads", told.elapsed().as_millis(), other.name);
        leader.probes(503).await?;
        other.probes(200).await?;
        while TcpStream::connect(leader.address).await.is_ok() {
            ensure!(told.elapsed() < TIMEOUT, "{} still lets clients in", leader.name);
            sleep(Duration::from_millis(5)).await;
        }
        println!("{} accepts no more clients", leader.name);

        self.bank.is_busy(false);
        let paid = next(&mut clients).await?;
        ensure!(paid.body == "paid\n", "{} {}", paid.status, paid.body);
        println!("the payment in progress: 200 OK");
        self.was_charged_once(41)?;
        let name = leader.name;
        leader.ended().await?;
        self.nothing_is_left_of(name).await?;

        self.invoices(&[42]).await?;
        self.until_reminded(42, other.name).await?;
        println!("and {} does the leader's work", other.name);
        Ok(())
    }

    async fn the_last_is_shut_down(&self, last: Process) -> Result<()> {
        title("The other gets SIGTERM as well");
        let name = last.name;
        last.terminate().await?;
        last.ended().await?;
        self.nothing_is_left_of(name).await?;
        let locks = advisory_locks(&mut *self.pool.acquire().await?).await;
        ensure!(locks.is_empty(), "locks are left: {locks:?}");
        Ok(())
    }

    /// Inserts invoices that are not paid.
    async fn invoices(&self, ids: &[i64]) -> Result<()> {
        let insert = "INSERT INTO invoice SELECT unnest($1)";
        sqlx::query(insert).bind(ids).execute(&self.pool).await?;
        Ok(())
    }

    /// Checks that the bank has charged the invoice once, and that no two requests for it were in flight at once.
    fn was_charged_once(&self, invoice: i64) -> Result<()> {
        let account = self.bank.account(invoice);
        ensure!(account.most_asking == 1, "{} asked for {invoice} at once", account.most_asking);
        ensure!(account.answered == 1, "{invoice} was charged {} times", account.answered);
        Ok(())
    }

    /// Waits until the server shows these numbers of locks, held and waited for. They include the lock of the election,
    /// which the leader holds and the other candidate waits for.
    async fn until_locks(&self, what: &str, held: usize, awaited: usize) -> Result<()> {
        let asked = Instant::now();
        let mut connection = self.pool.acquire().await?;
        loop {
            let locks = advisory_locks(&mut connection).await;
            let granted = locks.iter().filter(|lock| lock.granted).count();
            if (granted, locks.len() - granted) == (held, awaited) {
                return Ok(());
            }
            ensure!(asked.elapsed() < TIMEOUT, "waited in vain until {what}: {locks:#?}");
            sleep(Duration::from_millis(5)).await;
        }
    }

    async fn until_reminded(&self, invoice: i64, leader: &str) -> Result<()> {
        let asked = Instant::now();
        loop {
            let by: Option<String> =
                sqlx::query_scalar("SELECT reminded_by FROM invoice WHERE id = $1")
                    .bind(invoice)
                    .fetch_one(&self.pool)
                    .await?;
            if let Some(by) = by {
                ensure!(by == leader, "{by} sent a reminder, but {leader} leads");
                return Ok(());
            }
            ensure!(asked.elapsed() < TIMEOUT, "the leader {leader} does not send reminders");
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until the database has no session of a server any more. The name of a leader's session has its term and
    /// key after the server's name, so only the start is compared.
    async fn nothing_is_left_of(&self, name: &str) -> Result<()> {
        let asked = Instant::now();
        loop {
            let sessions: i64 = sqlx::query_scalar(
                "SELECT count(*) FROM pg_stat_activity
                 WHERE datname = current_database() AND application_name LIKE $1 || '%'",
            )
            .bind(name)
            .fetch_one(&self.pool)
            .await?;
            if sessions == 0 {
                println!("{name} has ended, and nothing is left of it on the database's server");
                return Ok(());
            }
            ensure!(asked.elapsed() < TIMEOUT, "{sessions} sessions of {name} are left");
            sleep(Duration::from_millis(5)).await;
        }
    }
}

async fn pay(server: SocketAddr, invoice: i64) -> Result<Answer> {
    Ok(http::post(server, &format!("/invoices/{invoice}/pay")).await?)
}

/// Waits for the next answer.
async fn next(clients: &mut JoinSet<Result<Answer>>) -> Result<Answer> {
    let answer = timeout(TIMEOUT, clients.join_next()).await.map_err(|_| "no answer comes")?;
    answer.ok_or("no client has asked")??
}

fn title(title: &str) {
    println!("\n{title}\n{}", "-".repeat(title.len()));
}
