//! The known state of the servers behind the pools of this process.

use std::collections::HashMap;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use sqlx::PgPool;
use sqlx::postgres::PgConnectOptions;

use super::budget::Budget;
use super::proof::Proof;

/// How long a server that has rejected the settings is used without them.
const ASK_AGAIN: Duration = Duration::from_mins(1);

/// The known state of one server, as one user sees it.
#[derive(Default)]
pub(crate) struct Server {
    pub(super) proof: Proof,
    /// When the server rejected the settings by which it detects a dead client.
    refused_settings: Mutex<Option<Instant>>,
    /// Whether waits do without plpgsql, because the role may not use it.
    pub(super) waits_plainly: AtomicBool,
    /// The server's `deadlock_timeout`, once it was queried.
    pub(super) deadlock_timeout: OnceLock<Duration>,
}

impl Server {
    /// Whether these options lead to this server.
    pub(super) fn is_at(self: &Arc<Self>, options: &PgConnectOptions) -> bool {
        Arc::ptr_eq(self, &find(options))
    }

    /// Whether the server has rejected the settings within the last [`ASK_AGAIN`]. After that, they are tried again.
    pub(super) fn refuses_settings(&self) -> bool {
        self.refused().is_some_and(|at| at.elapsed() < ASK_AGAIN)
    }

    /// Records that the server has rejected the settings. Returns whether that is new.
    pub(super) fn set_refused(&self) -> bool {
        self.refused().replace(Instant::now()).is_none()
    }

    /// Records that the server has accepted the settings.
    pub(super) fn set_accepted(&self) {
        *self.refused() = None;
    }

    fn refused(&self) -> MutexGuard<'_, Option<Instant>> {
        self.refused_settings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The server behind a pool, which is looked up again only when the pool's options change.
#[derive(Clone)]
pub(crate) struct PoolServer {
    options: Arc<PgConnectOptions>,
    server: Arc<Server>,
    /// The budget that limits how many of the pool's connections locks may have.
    pub(crate) budget: Arc<Budget>,
}

impl PoolServer {
    pub(crate) fn of(pool: &PgPool) -> Self {
        let options = pool.connect_options();
        let server = find(&options);
        Self { options, server, budget: Budget::of(pool) }
    }

    /// Returns the current server of the pool, because an application may give its pool other options.
    pub(crate) fn server(&mut self, pool: &PgPool) -> &Arc<Server> {
        if !Arc::ptr_eq(&self.options, &pool.connect_options()) {
            *self = Self::of(pool);
        }
        &self.server
    }
}

fn find(options: &PgConnectOptions) -> Arc<Server> {
    static SERVERS: LazyLock<Mutex<HashMap<String, Arc<Server>>>> = LazyLock::new(Mutex::default);

    let address = format!(
        "{:?} {} {} {} {:?}",
        options.get_socket(),
        options.get_host(),
        options.get_port(),
        options.get_username(),
        options.get_database(),
    );
    let mut servers = SERVERS.lock().unwrap_or_else(PoisonError::into_inner);
    Arc::clone(servers.entry(address).or_default())
}
