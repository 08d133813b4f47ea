//! What this process has found out about the servers behind its pools.

use std::collections::HashMap;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use sqlx::PgPool;
use sqlx::postgres::PgConnectOptions;

use super::budget::Budget;
use super::proof::Proof;

/// How long a server that has rejected the settings is used without.
const ASK_AGAIN: Duration = Duration::from_mins(1);

/// What is known of one server, as one user sees it.
#[derive(Default)]
pub(crate) struct Server {
    pub(super) proof: Proof,
    /// When it rejected the settings by which it detects a dead client.
    refused_settings: Mutex<Option<Instant>>,
    /// The role may not wait in plpgsql.
    pub(super) waits_plainly: AtomicBool,
    /// Its setting, once it was asked for.
    pub(super) deadlock_timeout: OnceLock<Duration>,
}

impl Server {
    /// Whether these options lead to this server.
    pub(super) fn is_at(self: &Arc<Self>, options: &PgConnectOptions) -> bool {
        Arc::ptr_eq(self, &find(options))
    }

    /// Whether the server has rejected the settings lately. It is asked again now and then.
    pub(super) fn refuses_settings(&self) -> bool {
        self.refused().is_some_and(|at| at.elapsed() < ASK_AGAIN)
    }

    /// The server has rejected the settings. Returns whether that is new.
    pub(super) fn set_refused(&self) -> bool {
        self.refused().replace(Instant::now()).is_none()
    }

    /// The server has accepted the settings.
    pub(super) fn set_accepted(&self) {
        *self.refused() = None;
    }

    fn refused(&self) -> MutexGuard<'_, Option<Instant>> {
        self.refused_settings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The server behind a pool, looked up once for as long as the pool's options stay what they are.
#[derive(Clone)]
pub(crate) struct PoolServer {
    options: Arc<PgConnectOptions>,
    server: Arc<Server>,
    /// How many of the pool's connections locks may have.
    pub(crate) budget: Arc<Budget>,
}

impl PoolServer {
    pub(crate) fn of(pool: &PgPool) -> Self {
        let options = pool.connect_options();
        let server = find(&options);
        Self { options, server, budget: Budget::of(pool) }
    }

    /// The server of now. An application may give its pool other options.
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
