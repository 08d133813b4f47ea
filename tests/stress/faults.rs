//! Faults: backends are killed, and statements are cancelled.

use crate::dice::Dice;
use crate::world::World;

/// Strikes one of the backends of the database: one that holds, waits, borrows, or is idle in the pool.
pub(crate) async fn strike(world: &World, dice: &mut Dice) {
    let backends: Vec<i32> = {
        let mut admin = world.admin.lock().await;
        let backends = sqlx::query_scalar(
            "SELECT pid FROM pg_stat_activity
             WHERE datname = current_database() AND pid <> pg_backend_pid() ORDER BY pid",
        );
        backends.fetch_all(&mut *admin).await.unwrap()
    };
    if let Some(backend) = backends.get(dice.place(backends.len().max(1))) {
        strike_backend(world, dice, *backend).await;
    }
}

/// Kills a backend, or, more often, cancels its statement.
pub(crate) async fn strike_backend(world: &World, dice: &mut Dice, backend: i32) {
    let (verb, is_killed, sql) = if dice.one_in(3) {
        ("kill", true, "SELECT pg_terminate_backend($1)")
    } else {
        ("cancel", false, "SELECT pg_cancel_backend($1)")
    };
    if !world.has(verb) {
        return;
    }
    world.spend(verb);
    world.table.note_fault(backend, is_killed);
    let mut admin = world.admin.lock().await;
    sqlx::query(sql).bind(backend).execute(&mut *admin).await.unwrap();
}
