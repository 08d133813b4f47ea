//! Records the metrics. `off.rs` has the same items, which do nothing.
//!
//! A value that is counted in a gauge keeps the handle with which it was added, so that it is subtracted from the same
//! gauge, on whatever thread it is dropped, and whatever recorder was installed meanwhile.

use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use ::metrics::{
    Counter, Gauge, Histogram, Key as Name, Label, Level, Metadata, Recorder, Unit,
    describe_counter, describe_gauge, describe_histogram, with_recorder,
};

use crate::error::Loss;
use crate::key::Key;
use crate::mode::Mode;

const ACQUIRE_DURATION: &str = "pglock_acquire_duration_seconds";
const WAIT_DURATION: &str = "pglock_wait_duration_seconds";
const HOLD_DURATION: &str = "pglock_hold_duration_seconds";
const LOCKS_HELD: &str = "pglock_locks_held";
const LOCKS_WAITING: &str = "pglock_locks_waiting";
const LEADER: &str = "pglock_leader";
const TERMS: &str = "pglock_terms_total";
const LOSSES: &str = "pglock_losses_total";
const ABANDONED_WAITS: &str = "pglock_abandoned_waits_total";
const CONNECTIONS_IN_USE: &str = "pglock_connections_in_use";
const MANAGER_BATCH_SIZE: &str = "pglock_manager_batch_size";
const MANAGER_QUEUE_LENGTH: &str = "pglock_manager_queue_length";
const HEARTBEAT_DURATION: &str = "pglock_heartbeat_duration_seconds";
const LAST_ANSWER_AGE: &str = "pglock_last_answer_age_seconds";

/// Whether [`enable`] was called. Until then not even the clock is read.
static RECORDING: AtomicBool = AtomicBool::new(false);

static METADATA: Metadata<'static> = Metadata::new("pglock", Level::INFO, Some("pglock"));

/// Starts recording, for the whole process.
///
/// Describes all metrics to the installed recorder, with their units, and registers those whose labels are known
/// before anything happens, so that counters and gauges are exported as zero.
///
/// Call it once, after the recorder was installed. Before that, nothing is recorded.
///
/// # Examples
///
/// ```
/// // Install a recorder here.
/// pglock::metrics::enable();
/// ```
pub fn enable() {
    RECORDING.store(true, Ordering::Relaxed);
    let seconds = Unit::Seconds;
    describe_histogram!(ACQUIRE_DURATION, seconds, "Duration of the calls that acquire a lock");
    describe_histogram!(WAIT_DURATION, seconds, "Time for which busy locks were waited for");
    describe_histogram!(HOLD_DURATION, seconds, "Time for which locks were held");
    describe_histogram!(HEARTBEAT_DURATION, seconds, "Round trip of the heartbeats");
    describe_histogram!(
        LAST_ANSWER_AGE,
        seconds,
        "Age of a session's last answer when the next heartbeat is answered"
    );
    let count = Unit::Count;
    describe_gauge!(LOCKS_HELD, count, "Guards that were neither released nor dropped");
    describe_gauge!(LOCKS_WAITING, count, "Calls that wait for a busy lock");
    describe_gauge!(LEADER, count, "Elections in which a candidate of this process leads");
    describe_counter!(TERMS, count, "Terms to which a candidate of this process was elected");
    describe_counter!(LOSSES, count, "Locks that were lost while they were held");
    describe_counter!(ABANDONED_WAITS, count, "Waits in the server's queue that were abandoned");
    describe_gauge!(CONNECTIONS_IN_USE, count, "Connections of the pools that locks use");
    describe_histogram!(MANAGER_BATCH_SIZE, count, "Keys that go into one statement of a manager");
    describe_gauge!(MANAGER_QUEUE_LENGTH, count, "Calls that wait for a manager");

    METRICS.set(Metrics::register());
    let reasons = [
        "disconnected",
        "held_too_long",
        "no_exclusion",
        "not_held",
        "runtime_shutdown",
        "unresponsive",
    ];
    for reason in reasons {
        drop(losses(reason));
    }
}

thread_local! {
    // Registered once for each thread, because a recorder takes longer to look a metric up than to record it. They are
    // not registered once for all threads, because a thread can have a recorder of its own.
    static METRICS: RefCell<Metrics> = RefCell::new(Metrics::register());
}

/// The metrics whose labels are known before anything happens.
struct Metrics {
    abandoned: Metric<Counter>,
    acquired: ByMode<Histogram>,
    age: Metric<Histogram>,
    batch: Metric<Histogram>,
    busy: ByMode<Histogram>,
    cancelled: ByMode<Histogram>,
    connections: Metric<Gauge>,
    error: ByMode<Histogram>,
    heartbeat: Metric<Histogram>,
    held: ByMode<Gauge>,
    hold: ByMode<Histogram>,
    queue: Metric<Gauge>,
    timed_out: ByMode<Histogram>,
    wait: ByMode<Histogram>,
    waiting: ByMode<Gauge>,
}

impl Metrics {
    fn register() -> Self {
        let acquire = |outcome| {
            ByMode::register(ACQUIRE_DURATION, &[Label::from_static_parts("outcome", outcome)])
        };
        Self {
            abandoned: Metric::register(ABANDONED_WAITS, Vec::new()),
            acquired: acquire("acquired"),
            age: Metric::register(LAST_ANSWER_AGE, Vec::new()),
            batch: Metric::register(MANAGER_BATCH_SIZE, Vec::new()),
            busy: acquire("busy"),
            cancelled: acquire("cancelled"),
            connections: Metric::register(CONNECTIONS_IN_USE, Vec::new()),
            error: acquire("error"),
            heartbeat: Metric::register(HEARTBEAT_DURATION, Vec::new()),
            held: ByMode::register(LOCKS_HELD, &[]),
            hold: ByMode::register(HOLD_DURATION, &[]),
            queue: Metric::register(MANAGER_QUEUE_LENGTH, Vec::new()),
            timed_out: acquire("timed_out"),
            wait: ByMode::register(WAIT_DURATION, &[]),
            waiting: ByMode::register(LOCKS_WAITING, &[]),
        }
    }
}

/// A metric with the label `mode`, and possibly others: one handle for each mode.
struct ByMode<T> {
    exclusive: Metric<T>,
    shared: Metric<T>,
}

impl<T: Record> ByMode<T> {
    fn register(name: &'static str, labels: &[Label]) -> Self {
        let metric = |mode| {
            let mode = Label::from_static_parts("mode", mode);
            Metric::register(name, [labels, &[mode]].concat())
        };
        Self { exclusive: metric("exclusive"), shared: metric("shared") }
    }

    fn by(&self, mode: Mode) -> &Metric<T> {
        match mode {
            Mode::Exclusive => &self.exclusive,
            Mode::Shared => &self.shared,
        }
    }
}

struct Metric<T> {
    name: Name,
    handle: T,
}

impl<T: Record> Metric<T> {
    fn register(name: &'static str, labels: Vec<Label>) -> Self {
        let name = Name::from_parts(name, labels);
        let handle = T::of(&name);
        Self { name, handle }
    }

    fn of(&self, key: Option<&Key>) -> T {
        key.map_or_else(|| self.handle.clone(), |key| T::of(&with_key(&self.name, key)))
    }
}

/// The handle of a metric, which records its values.
trait Record: Clone {
    /// A handle that records nothing.
    const OFF: Self;

    fn register(recorder: &dyn Recorder, name: &Name) -> Self;

    fn of(name: &Name) -> Self {
        if is_recording() {
            with_recorder(|recorder| Self::register(recorder, name))
        } else {
            Self::OFF
        }
    }
}

impl Record for Counter {
    const OFF: Self = Self::noop();

    fn register(recorder: &dyn Recorder, name: &Name) -> Self {
        recorder.register_counter(name, &METADATA)
    }
}

impl Record for Gauge {
    const OFF: Self = Self::noop();

    fn register(recorder: &dyn Recorder, name: &Name) -> Self {
        recorder.register_gauge(name, &METADATA)
    }
}

impl Record for Histogram {
    const OFF: Self = Self::noop();

    fn register(recorder: &dyn Recorder, name: &Name) -> Self {
        recorder.register_histogram(name, &METADATA)
    }
}

fn is_recording() -> bool {
    RECORDING.load(Ordering::Relaxed)
}

fn metric<T: Record>(choose: impl FnOnce(&Metrics) -> &Metric<T>, key: Option<&Key>) -> T {
    if !is_recording() {
        return T::OFF;
    }
    // A thread that is ending may have dropped its metrics already.
    METRICS.try_with(|metrics| choose(&metrics.borrow()).of(key)).unwrap_or(T::OFF)
}

fn losses(reason: &'static str) -> Counter {
    Counter::of(&Name::from_parts(LOSSES, vec![Label::from_static_parts("reason", reason)]))
}

fn with_key(name: &Name, key: &Key) -> Name {
    let value = key.name().map_or_else(|| key.to_string(), str::to_owned);
    name.with_extra_labels(vec![Label::new("key", value)])
}

/// The labels of a lock.
#[derive(Clone)]
pub(crate) struct Labels {
    counted: bool,
    mode: Mode,
    /// `Some` if the application wants the key as a label. Boxed, because otherwise every acquire would reserve memory
    /// for it.
    key: Option<Box<Key>>,
}

impl Labels {
    /// `counted` is whether the application makes the acquire, and not the crate.
    pub(crate) fn new(counted: bool, label_by_key: bool, key: &Key, mode: Mode) -> Self {
        let key = label_by_key.then(|| Box::new(key.clone()));
        Self { counted: counted && is_recording(), mode, key }
    }

    fn metric<T: Record>(&self, choose: impl FnOnce(&Metrics) -> &ByMode<T>) -> T {
        metric(|metrics| choose(metrics).by(self.mode), self.key.as_deref())
    }

    fn of_election<T: Record>(&self, name: &'static str) -> T {
        let name = Name::from_static_name(name);
        T::of(&self.key.as_deref().map_or_else(|| name.clone(), |key| with_key(&name, key)))
    }
}

/// A call that acquires.
///
/// # Drop
///
/// Records the duration under the outcome of the call. If [`end`](Self::end) was not called, the call was cancelled.
pub(crate) struct Acquire {
    labels: Labels,
    /// `Some` if the call is counted.
    started: Option<Instant>,
    /// Selects the histogram of the outcome, which is `cancelled` until it is known.
    duration: fn(&Metrics) -> &ByMode<Histogram>,
}

impl Acquire {
    pub(crate) fn start(labels: Labels) -> Self {
        let started = labels.counted.then(Instant::now);
        Self { labels, started, duration: |metrics| &metrics.cancelled }
    }

    /// Sets the outcome. `had_time` is whether the call could have waited.
    pub(crate) fn end<T, E>(mut self, acquired: &Result<Option<T>, E>, had_time: bool) {
        self.duration = match acquired {
            Ok(Some(_)) => |metrics| &metrics.acquired,
            Ok(None) if had_time => |metrics| &metrics.timed_out,
            Ok(None) => |metrics| &metrics.busy,
            Err(_) => |metrics| &metrics.error,
        };
    }
}

impl Drop for Acquire {
    fn drop(&mut self) {
        if let Some(started) = self.started {
            self.labels.metric(self.duration).record(started.elapsed());
        }
    }
}

/// One unit of a gauge.
///
/// # Drop
///
/// Decrements the gauge.
pub(crate) struct One(Gauge);

impl One {
    fn of(gauge: Gauge) -> Self {
        gauge.increment(1.0);
        Self(gauge)
    }
}

impl Drop for One {
    fn drop(&mut self) {
        self.0.decrement(1.0);
    }
}

/// A wait or a hold, which is counted in a gauge while it lasts.
///
/// # Drop
///
/// Records the duration.
struct Lasting {
    since: Instant,
    duration: Histogram,
    _one: One,
}

impl Lasting {
    fn start(
        labels: &Labels,
        number: fn(&Metrics) -> &ByMode<Gauge>,
        duration: fn(&Metrics) -> &ByMode<Histogram>,
    ) -> Option<Self> {
        labels.counted.then(|| Self {
            since: Instant::now(),
            duration: labels.metric(duration),
            _one: One::of(labels.metric(number)),
        })
    }
}

impl Drop for Lasting {
    fn drop(&mut self) {
        self.duration.record(self.since.elapsed());
    }
}

/// An acquire that waits for a busy lock, or may have to.
///
/// # Drop
///
/// Ends the wait.
#[derive(Default)]
pub(crate) struct Waiting {
    labels: Option<Labels>,
    lasting: Option<Lasting>,
}

impl Waiting {
    pub(crate) fn new(labels: Labels) -> Self {
        Self { labels: Some(labels), lasting: None }
    }

    /// Begins the wait, unless it has begun already.
    pub(crate) fn start(&mut self) {
        if let Some(labels) = self.labels.take() {
            self.lasting = Lasting::start(&labels, |m| &m.waiting, |m| &m.wait);
        }
    }
}

/// A lock that is held.
pub(crate) struct Held(Option<Lasting>);

impl Held {
    pub(crate) fn start(labels: &Labels) -> Self {
        Self(Lasting::start(labels, |m| &m.held, |m| &m.hold))
    }

    pub(crate) fn end(&mut self) {
        self.0 = None;
    }
}

/// Counts a connection that locks use.
pub(crate) fn connection() -> One {
    One::of(metric(|metrics| &metrics.connections, None))
}

/// Counts a call that waits for a manager.
pub(crate) fn queued() -> One {
    One::of(metric(|metrics| &metrics.queue, None))
}

/// Counts the candidate of a session as a leader while it leads.
#[derive(Default)]
pub(crate) struct Leading(Mutex<Option<One>>);

impl Leading {
    /// Records that the candidate was elected.
    pub(crate) fn start(&self, labels: &Labels) {
        labels.of_election::<Counter>(TERMS).increment(1);
        self.set(Some(One::of(labels.of_election(LEADER))));
    }

    /// Records that the candidate does not lead any more, if it did.
    pub(crate) fn end(&self) {
        self.set(None);
    }

    fn set(&self, leading: Option<One>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = leading;
    }
}

/// Registers the metrics of an election with a candidate, which show from now on whether the candidate leads.
pub(crate) fn candidate(labels: &Labels) {
    labels.of_election::<Counter>(TERMS).increment(0);
    labels.of_election::<Gauge>(LEADER).increment(0.0);
}

/// Records the loss of a session that held this number of locks.
pub(crate) fn lost(loss: &Loss, locks: usize) {
    let reason = match loss {
        Loss::Disconnected(_) => "disconnected",
        Loss::HeldTooLong => "held_too_long",
        Loss::NoExclusion => "no_exclusion",
        Loss::NotHeld => "not_held",
        // The application released the locks itself.
        Loss::Released => return,
        Loss::RuntimeShutdown => "runtime_shutdown",
        Loss::Unresponsive => "unresponsive",
    };
    losses(reason).increment(u64::try_from(locks).unwrap_or(u64::MAX));
}

/// Records an acquire that was dropped, or has failed. `waits` is whether it was in the server's queue.
pub(crate) fn abandoned(waits: bool) {
    if waits {
        metric(|metrics| &metrics.abandoned, None).increment(1);
    }
}

/// Records that a manager sends a statement with this number of steps.
#[expect(clippy::cast_precision_loss, reason = "there are at most a thousand")]
pub(crate) fn batch(steps: usize) {
    metric(|metrics| &metrics.batch, None).record(steps as f64);
}

/// Records the answer to a heartbeat that was sent at `asked`. The last answer of the session before it was at
/// `last_answered`.
pub(crate) fn heartbeat(asked: Instant, last_answered: impl FnOnce() -> Instant) {
    metric(|metrics| &metrics.heartbeat, None).record(asked.elapsed());
    metric(|metrics| &metrics.age, None).record(last_answered().elapsed());
}

/// Runs an update that serves only the metrics.
pub(crate) fn update(update: impl FnOnce()) {
    update();
}
