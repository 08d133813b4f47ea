//! Metrics for the [`metrics`](https://docs.rs/metrics) facade, and so for the exporters of Prometheus, OpenTelemetry
//! and statsd.
//!
//! From the call of [`enable`] on, the crate records to the recorder that the application has installed.
//!
//! | name | type | unit | labels | what it measures |
//! |---|---|---|---|---|
//! | `pglock_acquire_duration_seconds` | histogram | seconds | `outcome`, `mode` | each call that acquires, from its first poll to its end; re-entrant ones too. Its count is the number of calls |
//! | `pglock_wait_duration_seconds` | histogram | seconds | `mode` | the part of a call in which the lock was found busy and waited for, whatever the outcome |
//! | `pglock_hold_duration_seconds` | histogram | seconds | `mode` | from the grant of a guard to its release or drop |
//! | `pglock_locks_held` | gauge | locks | `mode` | guards that were neither released nor dropped, lost ones included |
//! | `pglock_locks_waiting` | gauge | locks | `mode` | calls that wait for a busy lock now |
//! | `pglock_leader` | gauge | elections | | elections in which a candidate of this process leads; with the label `key`, 1 or 0 for each |
//! | `pglock_terms_total` | counter | terms | | terms to which a candidate of this process was elected |
//! | `pglock_losses_total` | counter | locks | `reason` | locks that were lost while they were held, re-entrant guards not counted |
//! | `pglock_abandoned_waits_total` | counter | waits | | waits in the server's queue whose future was dropped, or that ended with an error or without an answer. Each is cancelled through another connection |
//! | `pglock_connections_in_use` | gauge | connections | | connections of all pools that locks use, to hold or to wait |
//! | `pglock_manager_batch_size` | histogram | steps | | keys that a [`LockManager`](crate::LockManager) acquires or releases with one statement |
//! | `pglock_manager_queue_length` | gauge | calls | | calls that wait for a [`LockManager`](crate::LockManager): for the server's answer, or for a busy lock |
//! | `pglock_heartbeat_duration_seconds` | histogram | seconds | | the round trip of each [heartbeat](crate::LockOptions::heartbeat_interval) that was answered |
//! | `pglock_last_answer_age_seconds` | histogram | seconds | | how old the session's last answer was when the answer to a heartbeat arrived. At the heartbeat's interval and timeout, by default 4 s, the session would have been lost |
//!
//! | label | values |
//! |---|---|
//! | `outcome` | `acquired`; `busy`, for a call that does not wait; `timed_out`; `error`; `cancelled`, if the future was dropped |
//! | `mode` | `exclusive`, `shared`; of several keys with different modes, the mode of the first key |
//! | `reason` | the variant of [`Loss`](crate::Loss): `disconnected`, `held_too_long`, `no_exclusion`, `not_held`, `runtime_shutdown`, `unresponsive` |
//! | `key` | only with [`LockOptions::label_metrics_by_key`](crate::LockOptions::label_metrics_by_key), and only where the table has `mode` as a label, and for elections |
//!
//! All labels but `key` have few values, so the number of time series does not grow with the number of keys.
//!
//! Each guard counts as one lock, also a [`MultiGuard`](crate::MultiGuard). A candidate of an
//! [`Election`](crate::Election) counts as waiting for a lock, and its leader as holding one. A permit of a
//! [`Semaphore`](crate::Semaphore) counts as an exclusive lock. Downgrades and upgrades do not count as acquires; they
//! end one hold and begin another. Locks of a [`transaction`](crate::transaction) are not measured.
//!
//! # Names
//!
//! The names are those that Prometheus shows: they end with the unit, and counters with `_total`. The exporter for
//! Prometheus adds neither by default, and with its recommended naming only what is missing. Exporters that
//! translate OpenTelemetry to Prometheus do not repeat them either. Times are in seconds.
//!
//! # Setting it up
//!
//! Install the recorder, and then call [`enable`], both before the first lock is acquired. A guard, a wait or a
//! leader that began before is not counted.
//!
//! Without this call, the feature costs some nanoseconds for each lock. With it, and the exporter for Prometheus, a
//! free lock takes 1 to 2 % longer to acquire and release. With 1,000 tasks, a lock of a
//! [`LockManager`](crate::LockManager) whose release is awaited takes about 15 % longer. A lock that a manager hands
//! off within the process takes 0.8 µs of processor time more; two histograms and two gauges that two threads
//! record cost as much by themselves.
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let pool = pglock_testkit::pool().await;
//! use metrics_exporter_prometheus::{Matcher, PrometheusBuilder};
//! use pglock::Lock;
//!
//! // Several bounds are between 2 s and 4 s, because the age of the last answer is usually just over 2 s, and a bucket
//! // does not show where in it a value is.
//! let bounds = [0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 2.2, 3.0, 4.0, 10.0, 60.0, 600.0];
//! let handle = PrometheusBuilder::new()
//!     // Without buckets, histograms are exported as summaries.
//!     .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &bounds)?
//!     .install_recorder()?;
//! pglock::metrics::enable();
//!
//! let guard = Lock::new(&pool, "nightly-report").acquire().await?;
//! let page = handle.render(); // the answer to `GET /metrics`
//! assert!(page.contains(r#"pglock_locks_held{mode="exclusive"} 1"#));
//! # drop(guard); Ok(()) }
//! ```
//!
//! * **Upkeep.** The exporter for Prometheus keeps each value of a histogram until the next scrape or the next call of
//!   `handle.run_upkeep()`. Its `install_recorder` starts no task that makes this call, so make it every 5 s, for
//!   example, as the example `web_app` does; otherwise the memory of a process that is not scraped grows.
//! * **No idle timeout.** Each thread keeps the handles that it has registered. The exporter's `idle_timeout` removes
//!   counters, gauges and histograms that have not changed for a while, and values that such a handle records later are
//!   not exported. Don't use it with these metrics.
//! * **Local recorders.** For the same reason, install a local recorder before its thread records its first metric.

mod record;

pub use record::enable;
pub(crate) use record::{
    Acquire, Held, Labels, Leading, One, Waiting, abandoned, batch, candidate, connection,
    heartbeat, lost, queued, update,
};
