//! The page that Prometheus reads.

use axum::Router;
use axum::routing::get;
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder};

/// Upper bounds of the histograms, in seconds: from a free lock to a payment that takes minutes. Some are between the
/// heartbeat's interval and its bound, for an alert before a session is lost.
const SECONDS: [f64; 12] = [0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 2.2, 3.0, 4.0, 10.0, 60.0, 600.0];

/// Installs the recorder of the process, before its first lock, and answers `GET /metrics`.
pub(crate) fn router() -> Result<Router, BuildError> {
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &SECONDS)?
        .install_recorder()?;
    pglock::metrics::describe();
    Ok(Router::new().route("/metrics", get(async move || handle.render())))
}
