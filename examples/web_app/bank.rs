//! The bank: the part of a payment that is outside the database. It also records the requests, to check them.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Path, State};
use axum::routing::post;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::Result;

/// How long the bank waits for the requests that the demo expects.
const TIMEOUT: Duration = Duration::from_secs(20);

/// A bank that charges invoices at `/charge/{invoice}`, each once, however often it is asked.
pub(crate) struct Bank {
    address: SocketAddr,
    books: Books,
    /// Closes the bank when dropped.
    _serving: JoinSet<()>,
}

type Books = Arc<watch::Sender<Book>>;

/// The records of the bank.
#[derive(Default)]
pub(crate) struct Book {
    /// Whether requests must wait.
    busy: bool,
    accounts: HashMap<i64, Account>,
}

/// The bank's records of one invoice.
#[derive(Clone, Copy, Default)]
pub(crate) struct Account {
    /// How many requests to charge it are in flight, and the largest number of them at once.
    pub(crate) asking: usize,
    pub(crate) most_asking: usize,
    /// How many requests were answered that it is charged.
    pub(crate) answered: usize,
}

impl Bank {
    /// Opens a bank on a free port of this machine.
    pub(crate) async fn open() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let books = Books::default();
        let router =
            Router::new().route("/charge/{invoice}", post(charge)).with_state(Arc::clone(&books));
        let mut serving = JoinSet::new();
        serving.spawn(async move { drop(axum::serve(listener, router).await) });
        Ok(Self { address, books, _serving: serving })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Makes all requests wait, or lets the waiting requests go on.
    pub(crate) fn is_busy(&self, busy: bool) {
        self.books.send_modify(|book| book.busy = busy);
    }

    pub(crate) fn account(&self, invoice: i64) -> Account {
        self.books.borrow().account(invoice)
    }

    /// Waits until `count` requests are waiting, for all these invoices together.
    pub(crate) async fn until_asking(&self, count: usize, invoices: &[i64]) -> Result<()> {
        let mut book = self.books.subscribe();
        let asking = |book: &Book| {
            let asking = invoices.iter().map(|invoice| book.account(*invoice).asking);
            asking.sum::<usize>() == count
        };
        let waiting = timeout(TIMEOUT, book.wait_for(asking));
        ensure!(waiting.await.is_ok(), "not {count} ask the bank to charge {invoices:?}");
        Ok(())
    }
}

impl Book {
    fn account(&self, invoice: i64) -> Account {
        self.accounts.get(&invoice).copied().unwrap_or_default()
    }
}

async fn charge(State(books): State<Books>, Path(invoice): Path<i64>) -> &'static str {
    let _customer = Customer::enters(Arc::clone(&books), invoice);
    let mut book = books.subscribe();
    drop(book.wait_for(|book| !book.busy).await);
    books.send_modify(|book| book.accounts.entry(invoice).or_default().answered += 1);
    "charged\n"
}

/// A request that is in flight. Dropped when the request ends, or when the client hangs up.
struct Customer {
    books: Books,
    invoice: i64,
}

impl Customer {
    fn enters(books: Books, invoice: i64) -> Self {
        books.send_modify(|book| {
            let account = book.accounts.entry(invoice).or_default();
            account.asking += 1;
            account.most_asking = account.most_asking.max(account.asking);
        });
        Self { books, invoice }
    }
}

impl Drop for Customer {
    fn drop(&mut self) {
        self.books.send_modify(|book| book.accounts.entry(self.invoice).or_default().asking -= 1);
    }
}
