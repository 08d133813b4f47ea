//! A pool whose connections are open.

use sqlx::PgPool;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};

/// Makes a pool that has opened all its connections.
pub(crate) async fn warm_pool(
    options: &PgConnectOptions,
    connections: u32,
) -> Result<PgPool, sqlx::Error> {
    let pool = PgPoolOptions::new().max_connections(connections);
    let pool = pool.connect_with(options.clone()).await?;
    let mut open = Vec::new();
    for _ in 0..connections {
        open.push(pool.acquire().await?);
    }
    Ok(pool)
}
