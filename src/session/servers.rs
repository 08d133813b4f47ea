//! What this process has found out about the servers behind its pools.

use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use sqlx::PgPool;

/// What is known of one server, as one user sees it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Findings {
    /// Asked often enough to trust that no transaction pooler sits in between.
    pub(crate) direct: bool,
    /// It refuses the settings by which it would notice a dead client.
    pub(crate) refuses_settings: bool,
}

static SERVERS: LazyLock<Mutex<HashMap<String, Findings>>> = LazyLock::new(Mutex::default);

/// Returns what is known of the server behind a pool.
pub(crate) fn findings(pool: &PgPool) -> Findings {
    servers().get(&address(pool)).copied().unwrap_or_default()
}

/// Writes down something new about the server behind a pool.
pub(crate) fn learn(pool: &PgPool, what: impl FnOnce(&mut Findings)) {
    what(servers().entry(address(pool)).or_default());
}

fn servers() -> MutexGuard<'static, HashMap<String, Findings>> {
    SERVERS.lock().unwrap_or_else(PoisonError::into_inner)
}

fn address(pool: &PgPool) -> String {
    let options = pool.connect_options();
    format!(
        "{:?} {} {} {} {:?}",
        options.get_socket(),
        options.get_host(),
        options.get_port(),
        options.get_username(),
        options.get_database(),
    )
}
