//! Captures the log of a test's thread.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::{DefaultGuard, set_default};
use tracing::{Dispatch, Event, Level, Metadata, Subscriber};
use tracing_subscriber::Registry;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;

/// All that was logged on this thread. A current-thread runtime runs its tasks on this thread, too.
pub(crate) struct Logged {
    entries: Arc<Mutex<Vec<Entry>>>,
    _capturing: DefaultGuard,
}

impl Logged {
    pub(crate) fn from_now_on() -> Self {
        let entries = Arc::default();
        Self { _capturing: capture(Capture { entries: Arc::clone(&entries) }), entries }
    }

    pub(crate) fn all(&self) -> Vec<Entry> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns the spans of acquires that have ended, in order.
    pub(crate) fn acquires(&self) -> Vec<Entry> {
        let is_acquire =
            |entry: &Entry| entry.metadata.is_span() && entry.metadata.name() == "acquire";
        self.all().into_iter().filter(is_acquire).collect()
    }

    /// Returns pglock's own events of a level.
    pub(crate) fn events(&self, level: Level) -> Vec<Entry> {
        let is_meant = |entry: &Entry| {
            entry.is_ours() && entry.metadata.is_event() && *entry.metadata.level() == level
        };
        self.all().into_iter().filter(is_meant).collect()
    }

    /// Returns the events of a level, and of more severe ones, of all crates.
    pub(crate) fn events_from(&self, level: Level) -> Vec<Entry> {
        let is_meant =
            |entry: &Entry| entry.metadata.is_event() && *entry.metadata.level() <= level;
        self.all().into_iter().filter(is_meant).collect()
    }

    /// Fails if any crate, sqlx included, logged something that an operator would see.
    pub(crate) fn nothing_loud(&self) {
        let loud = |entry: &Entry| *entry.metadata.level() <= Level::INFO;
        let loud: Vec<Entry> = self.all().into_iter().filter(loud).collect();
        assert!(loud.is_empty(), "{loud:#?}");
    }
}

/// Makes a layer receive all that is logged on this thread, until the guard is dropped.
pub(crate) fn capture(layer: impl Layer<Registry> + Send + Sync) -> DefaultGuard {
    LazyLock::force(&BYSTANDERS);
    set_default(Registry::default().with(layer))
}

/// Subscribers that record nothing, for as long as the process lives.
///
/// While there is only one subscriber, a callsite that is first reached on a thread without it is disabled
/// from then on: `tracing` asks only that thread's subscriber, which is the empty one, and caches the answer.
/// With two or more subscribers it asks all of them.
static BYSTANDERS: LazyLock<[Dispatch; 2]> =
    LazyLock::new(|| std::array::from_fn(|_| Dispatch::new(Registry::default())));

/// A closed span, or an event.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) metadata: &'static Metadata<'static>,
    fields: Fields,
}

impl Entry {
    pub(crate) fn field(&self, name: &str) -> Option<&str> {
        self.fields.0.get(name).map(String::as_str)
    }

    pub(crate) fn is_ours(&self) -> bool {
        self.metadata.target().split("::").next() == Some("pglock")
    }
}

/// The fields of a span or an event, as text. An event's message is one of them.
#[derive(Clone, Debug, Default)]
struct Fields(BTreeMap<&'static str, String>);

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0.insert(field.name(), format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name(), value.to_owned());
    }
}

struct Capture {
    entries: Arc<Mutex<Vec<Entry>>>,
}

impl Capture {
    fn push(&self, entry: Entry) {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner).push(entry);
    }
}

impl<S: Subscriber + for<'s> LookupSpan<'s>> Layer<S> for Capture {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        context.span(id).unwrap().extensions_mut().insert(fields);
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        let span = context.span(id).unwrap();
        values.record(span.extensions_mut().get_mut::<Fields>().unwrap());
    }

    fn on_close(&self, id: Id, context: Context<'_, S>) {
        let span = context.span(&id).unwrap();
        let fields = span.extensions_mut().remove().unwrap();
        self.push(Entry { metadata: span.metadata(), fields });
    }

    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        self.push(Entry { metadata: event.metadata(), fields });
    }
}
