//! The page that Prometheus reads.

use std::time::Duration;

use axum::Router;
use axum::routing::get;
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder};
use tokio::runtime::Handle;
use tokio::time::sleep;

/// Upper bounds of the histograms, in seconds: from a free lock to a payment that takes minutes. Some are between the
/// heartbeat's interval and its bound, for an alert before a session is lost.
const SECONDS: [f64; 12] = [0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 2.2, 3.0, 4.0, 10.0, 60.0, 600.0];

/// How often the exporter sums up the values of histograms. Until then, or until a scrape, it keeps each value.
const UPKEEP: Duration = Duration::from_secs(5);

/// Installs the recorder of the process, before its first lock, and answers `GET /metrics`. Needs a tokio runtime.
pub(crate) fn router() -> Result<Router, BuildError> {
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &SECONDS)?
        .install_recorder()?;
    pglock::metrics::enable();
    let upkeep = handle.clone();
    Handle::current().spawn(async move {
        loop {
            sleep(UPKEEP).await;
            upkeep.run_upkeep();
        }
    });
    Ok(Router::new().route("/metrics", get(async move || handle.render())))
}
