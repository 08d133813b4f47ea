//! Logs to standard error: the warnings of the library and of sqlx, and with `-v` what the program does.

use std::fmt;
use std::io::stderr;

use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, Layer};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer as _, Registry, filter};

/// The targets of warnings that the program reports itself: losses and failed terms.
const REPORTED: [&str; 2] = ["pglock::session", "pglock::election"];

/// Starts printing events: warnings; with one `-v`, also what the program does; with two, also the debug events of the
/// library.
pub(crate) fn start(verbosity: u8) {
    let wanted = move |metadata: &Metadata<'_>| match verbosity {
        0 => *metadata.level() <= Level::WARN && !REPORTED.contains(&metadata.target()),
        1 => *metadata.level() <= Level::INFO,
        _ => {
            *metadata.level() <= Level::DEBUG && metadata.target().starts_with("pglock")
                || *metadata.level() <= Level::INFO
        }
    };
    let lines = Layer::default().event_format(Lines).with_ansi(false).with_writer(stderr);
    // This can't fail, because the program sets no other subscriber.
    Registry::default().with(lines.with_filter(filter::filter_fn(wanted))).try_init().ok();
}

/// Formats each event as one line, like the messages that the program prints itself.
struct Lines;

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        ctx: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let level = match *event.metadata().level() {
            Level::ERROR => "error: ",
            Level::WARN => "warning: ",
            Level::INFO => "",
            _ => "debug: ",
        };
        write!(writer, "pglock: {level}")?;
        ctx.format_fields(writer.by_ref(), event)?;
        writer.write_char('\n')
    }
}
