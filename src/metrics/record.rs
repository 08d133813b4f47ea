//! Records the metrics. `off.rs` has the same items, which do nothing.
//!
//! A value that is counted in a gauge keeps the handle by which it was added, so that it is taken out of the same one:
//! on whatever thread it is dropped, and whatever recorder was installed meanwhile.

use std::borrow::Cow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use ::metrics::{
    Counter, Gauge, Histogram, Key as Name, Label, Level, Metadata, Unit, describe_counter,
    describe_gauge, describe_histogram, with_recorder,
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

const EXCLUSIVE: Label = Label::from_static_parts("mode", "exclusive");
const SHARED: Label = Label::from_static_parts("mode", "shared");

static MODES: [[Label; 1]; 2] = [[EXCLUSIVE], [SHARED]];
static ACQUIRED_LABELS: [[Label; 2]; 2] = with_outcome("acquired");
static BUSY_LABELS: [[Label; 2]; 2] = with_outcome("busy");
static CANCELLED_LABELS: [[Label; 2]; 2] = with_outcome("cancelled");
static ERROR_LABELS: [[Label; 2]; 2] = with_outcome("error");
static TIMED_OUT_LABELS: [[Label; 2]; 2] = with_outcome("timed_out");

// Static, so that a recorder finds the hash of each in it.
static ACQUIRED: ByMode = ByMode::new(ACQUIRE_DURATION, &ACQUIRED_LABELS);
static BUSY: ByMode = ByMode::new(ACQUIRE_DURATION, &BUSY_LABELS);
static CANCELLED: ByMode = ByMode::new(ACQUIRE_DURATION, &CANCELLED_LABELS);
static ERROR: ByMode = ByMode::new(ACQUIRE_DURATION, &ERROR_LABELS);
static TIMED_OUT: ByMode = ByMode::new(ACQUIRE_DURATION, &TIMED_OUT_LABELS);
static HELD: ByMode = ByMode::new(LOCKS_HELD, &MODES);
static HOLD: ByMode = ByMode::new(HOLD_DURATION, &MODES);
static WAIT: ByMode = ByMode::new(WAIT_DURATION, &MODES);
static WAITS: ByMode = ByMode::new(LOCKS_WAITING, &MODES);
static ABANDONED: Name = Name::from_static_name(ABANDONED_WAITS);
static AGE: Name = Name::from_static_name(LAST_ANSWER_AGE);
static BATCH: Name = Name::from_static_name(MANAGER_BATCH_SIZE);
static CONNECTIONS: Name = Name::from_static_name(CONNECTIONS_IN_USE);
static HEARTBEAT: Name = Name::from_static_name(HEARTBEAT_DURATION);
static LEADERS: Name = Name::from_static_name(LEADER);
static QUEUE: Name = Name::from_static_name(MANAGER_QUEUE_LENGTH);
static TERM: Name = Name::from_static_name(TERMS);

/// Whether [`describe`] was called. Until then not even the clock is read.
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
/// pglock::metrics::describe();
/// ```
pub fn describe() {
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

    for mode in [Mode::Exclusive, Mode::Shared] {
        for acquire in [&ACQUIRED, &BUSY, &CANCELLED, &ERROR, &TIMED_OUT] {
            drop(histogram(acquire.name(mode)));
        }
        drop((histogram(HOLD.name(mode)), histogram(WAIT.name(mode))));
        drop((gauge(HELD.name(mode)), gauge(WAITS.name(mode))));
    }
    for name in [&AGE, &BATCH, &HEARTBEAT] {
        drop(histogram(name));
    }
    drop((gauge(&CONNECTIONS), gauge(&QUEUE), counter(&ABANDONED)));
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

/// A metric whose label is the mode, and others.
struct ByMode {
    exclusive: Name,
    shared: Name,
}

impl ByMode {
    const fn new<const N: usize>(name: &'static str, labels: &'static [[Label; N]; 2]) -> Self {
        let [exclusive, shared] = labels;
        Self {
            exclusive: Name::from_static_parts(name, exclusive),
            shared: Name::from_static_parts(name, shared),
        }
    }

    fn name(&self, mode: Mode) -> &Name {
        match mode {
            Mode::Exclusive => &self.exclusive,
            Mode::Shared => &self.shared,
        }
    }
}

const fn with_outcome(outcome: &'static str) -> [[Label; 2]; 2] {
    [
        [Label::from_static_parts("outcome", outcome), EXCLUSIVE],
        [Label::from_static_parts("outcome", outcome), SHARED],
    ]
}

fn is_recording() -> bool {
    RECORDING.load(Ordering::Relaxed)
}

fn counter(name: &Name) -> Counter {
    if !is_recording() {
        return Counter::noop();
    }
    with_recorder(|recorder| recorder.register_counter(name, &METADATA))
}

fn gauge(name: &Name) -> Gauge {
    if !is_recording() {
        return Gauge::noop();
    }
    with_recorder(|recorder| recorder.register_gauge(name, &METADATA))
}

fn histogram(name: &Name) -> Histogram {
    if !is_recording() {
        return Histogram::noop();
    }
    with_recorder(|recorder| recorder.register_histogram(name, &METADATA))
}

fn losses(reason: &'static str) -> Counter {
    counter(&Name::from_parts(LOSSES, vec![Label::from_static_parts("reason", reason)]))
}

/// Whether the application wants the key as a label.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) enum KeyLabel {
    #[default]
    Omit,
    Show,
}

/// Whether an acquire is counted. Those that the crate makes for an acquire of the application are not.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) enum Counted {
    No,
    #[default]
    Yes,
}

impl Counted {
    pub(crate) fn no() -> Self {
        Self::No
    }
}

/// The labels of a lock.
#[derive(Clone, Debug)]
pub(crate) struct Labels {
    counted: Counted,
    mode: Mode,
    /// If the application wants it as a label.
    key: Option<Key>,
}

impl Labels {
    pub(crate) fn new(label: KeyLabel, key: &Key, mode: Mode) -> Self {
        let counted = if is_recording() { Counted::Yes } else { Counted::No };
        let key = (label == KeyLabel::Show).then(|| key.clone());
        Self { counted, mode, key }
    }

    pub(crate) fn only_if(self, counted: Counted) -> Self {
        if counted == Counted::Yes { self } else { Self { counted, ..self } }
    }

    fn are_counted(&self) -> bool {
        self.counted == Counted::Yes
    }

    fn of(&self, metric: &'static ByMode) -> Cow<'static, Name> {
        self.by_key(metric.name(self.mode))
    }

    fn by_key(&self, name: &'static Name) -> Cow<'static, Name> {
        let Some(key) = &self.key else { return Cow::Borrowed(name) };
        let value = key.name().map_or_else(|| key.to_string(), str::to_owned);
        Cow::Owned(name.with_extra_labels(vec![Label::new("key", value)]))
    }
}

/// A call that acquires.
///
/// # Drop
///
/// Records how it ended: if that was not said, its future was dropped.
#[derive(Debug)]
pub(crate) struct Acquire {
    labels: Labels,
    /// If it is counted.
    started: Option<Instant>,
    outcome: Outcome,
}

#[derive(Clone, Copy, Debug)]
enum Outcome {
    Acquired,
    Busy,
    Cancelled,
    Error,
    TimedOut,
}

impl Acquire {
    pub(crate) fn start(labels: Labels) -> Self {
        let started = labels.are_counted().then(Instant::now);
        Self { labels, started, outcome: Outcome::Cancelled }
    }

    /// `had_time` says whether the call could have waited.
    pub(crate) fn end<T, E>(mut self, acquired: &Result<Option<T>, E>, had_time: bool) {
        self.outcome = match acquired {
            Ok(Some(_)) => Outcome::Acquired,
            Ok(None) if had_time => Outcome::TimedOut,
            Ok(None) => Outcome::Busy,
            Err(_) => Outcome::Error,
        };
    }
}

impl Drop for Acquire {
    fn drop(&mut self) {
        let Some(started) = self.started else { return };
        let metric = match self.outcome {
            Outcome::Acquired => &ACQUIRED,
            Outcome::Busy => &BUSY,
            Outcome::Cancelled => &CANCELLED,
            Outcome::Error => &ERROR,
            Outcome::TimedOut => &TIMED_OUT,
        };
        histogram(&self.labels.of(metric)).record(started.elapsed());
    }
}

/// One of what a gauge counts.
///
/// # Drop
///
/// It counts no more.
#[derive(Debug)]
struct One(Gauge);

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

/// Something that lasts, and is counted meanwhile.
///
/// # Drop
///
/// Records how long it lasted.
#[derive(Debug)]
struct Lasting {
    since: Instant,
    duration: Histogram,
    _one: One,
}

impl Lasting {
    fn start(labels: &Labels, number: &'static ByMode, duration: &'static ByMode) -> Option<Self> {
        labels.are_counted().then(|| Self {
            since: Instant::now(),
            duration: histogram(&labels.of(duration)),
            _one: One::of(gauge(&labels.of(number))),
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
/// It waits no longer.
#[derive(Debug, Default)]
pub(crate) struct Waiting {
    labels: Option<Labels>,
    lasting: Option<Lasting>,
}

impl Waiting {
    pub(crate) fn new(labels: Labels) -> Self {
        Self { labels: Some(labels), lasting: None }
    }

    /// From now on it waits, if it did not before.
    pub(crate) fn start(&mut self) {
        if let Some(labels) = self.labels.take() {
            self.lasting = Lasting::start(&labels, &WAITS, &WAIT);
        }
    }

    pub(crate) fn end(self) {
        drop(self);
    }
}

/// A lock that is held.
#[derive(Debug)]
pub(crate) struct Held(Option<Lasting>);

impl Held {
    pub(crate) fn start(labels: &Labels) -> Self {
        Self(Lasting::start(labels, &HELD, &HOLD))
    }

    pub(crate) fn end(&mut self) {
        self.0 = None;
    }
}

/// A connection that locks use.
#[derive(Debug)]
pub(crate) struct Connection(#[expect(dead_code, reason = "its drop counts")] One);

impl Connection {
    pub(crate) fn taken() -> Self {
        Self(One::of(gauge(&CONNECTIONS)))
    }
}

/// A call that waits for a manager.
#[derive(Debug)]
pub(crate) struct Queued(#[expect(dead_code, reason = "its drop counts")] One);

impl Queued {
    pub(crate) fn start() -> Self {
        Self(One::of(gauge(&QUEUE)))
    }
}

/// The part of a session in an election: whether its candidate leads.
#[derive(Debug, Default)]
pub(crate) struct Leading(Mutex<Option<One>>);

impl Leading {
    /// The candidate was elected.
    pub(crate) fn start(&self, labels: &Labels) {
        counter(&labels.by_key(&TERM)).increment(1);
        self.set(Some(One::of(gauge(&labels.by_key(&LEADERS)))));
    }

    /// The candidate leads no longer, if it did.
    pub(crate) fn end(&self) {
        self.set(None);
    }

    fn set(&self, leading: Option<One>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = leading;
    }
}

/// There is a candidate: from now on it is shown whether it leads.
pub(crate) fn candidate(labels: &Labels) {
    counter(&labels.by_key(&TERM)).increment(0);
    gauge(&labels.by_key(&LEADERS)).increment(0.0);
}

/// A session was lost that held this number of locks.
pub(crate) fn lost(loss: &Loss, locks: usize) {
    let reason = match loss {
        Loss::Disconnected(_) => "disconnected",
        Loss::HeldTooLong => "held_too_long",
        Loss::NoExclusion => "no_exclusion",
        Loss::NotHeld => "not_held",
        // The application wanted it.
        Loss::Released => return,
        Loss::RuntimeShutdown => "runtime_shutdown",
        Loss::Unresponsive => "unresponsive",
    };
    losses(reason).increment(u64::try_from(locks).unwrap_or(u64::MAX));
}

/// An acquire was dropped, or has failed. `waits` if it was in the server's queue.
pub(crate) fn abandoned(waits: bool) {
    if waits {
        counter(&ABANDONED).increment(1);
    }
}

/// A manager sends a statement with this number of steps.
#[expect(clippy::cast_precision_loss, reason = "there are at most a thousand")]
pub(crate) fn batch(steps: usize) {
    histogram(&BATCH).record(steps as f64);
}

/// A heartbeat was answered that was sent at `asked`, in a session that was last known to live at `last_answered`.
pub(crate) fn heartbeat(asked: Instant, last_answered: impl FnOnce() -> Instant) {
    histogram(&HEARTBEAT).record(asked.elapsed());
    histogram(&AGE).record(last_answered().elapsed());
}

/// Does what is done for the sake of a metric only.
pub(crate) fn update(update: impl FnOnce()) {
    update();
}
