//! What this process has found out about the servers behind its pools.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use sqlx::PgPool;
use sqlx::postgres::PgConnectOptions;

/// What is known of one server, as one user sees it.
#[derive(Debug, Default)]
pub(crate) struct Server {
    /// Asked often enough to trust that no transaction pooler sits in between.
    direct: AtomicBool,
    /// It refuses the settings by which it would notice a dead client.
    refuses_settings: AtomicBool,
}

impl Server {
    pub(super) fn is_direct(&self) -> bool {
        self.direct.load(Ordering::Relaxed)
    }

    pub(super) fn set_direct(&self, direct: bool) {
        self.direct.store(direct, Ordering::Relaxed);
    }

    pub(super) fn refuses_settings(&self) -> bool {
        self.refuses_settings.load(Ordering::Relaxed)
    }

    pub(super) fn refused_settings(&self) {
        self.refuses_settings.store(true, Ordering::Relaxed);
    }
}

/// The server behind a pool, looked up once for as long as the pool's options stay what they are.
#[derive(Clone, Debug)]
pub(crate) struct Behind {
    options: Arc<PgConnectOptions>,
    server: Arc<Server>,
}

impl Behind {
    pub(crate) fn of(pool: &PgPool) -> Self {
        let options = pool.connect_options();
        let server = find(&options);
        Self { options, server }
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
