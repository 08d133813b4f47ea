//! Observes which candidate leads.

use std::fmt;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_core::Stream;
use sqlx::PgPool;
use tokio::runtime::Handle;
use tokio::time::{Instant, sleep_until};

#[cfg(doc)]
use super::Election;
use crate::application_name;
use crate::error::{Error, Result};
use crate::key::Key;
use crate::session::conn::Conn;
use crate::session::policy::WaitPolicy;
use crate::session::pool::lend;
use crate::session::{DEADLINE, within};
use crate::sql;
use crate::sql::election::Holder;

/// The pause between two lookups of the leader, after a change.
const SHORTEST_PAUSE: Duration = Duration::from_millis(500);

/// The pause between two lookups when nothing has changed for long.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// The leader of an election, as the server shows it.
///
/// # Examples
///
/// As for [`Election::leader`].
#[derive(Clone, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Leader {
    /// The name of the candidate.
    pub name: String,
    /// The term. `None` for a moment after the election, and if another program holds the lock.
    pub term: Option<i64>,
    /// When the leader was elected, to the second, by its own clock. `None` whenever the term is.
    #[cfg_attr(feature = "serde", serde(serialize_with = "crate::serialize::whole_seconds"))]
    pub since: Option<SystemTime>,
    /// The process id of the server's backend for the leader's session.
    pub backend_pid: i32,
    /// The address of the leader. `None` over a unix socket, and if the caller's role may not see it, which
    /// requires the leader's own role, or `pg_read_all_stats`.
    pub client_addr: Option<String>,
}

impl Leader {
    /// Formats the `application_name` of a leader: the name, then term and time in a short form that can be parsed, and
    /// the key.
    pub(super) fn show(name: &str, term: i64, since: SystemTime, key: &Key) -> String {
        let since = since.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let key = application_name::of_key(key);
        // Others find the leader by its name, so the key is cut first.
        application_name::with_rest(name, &format!(" {term}@{since}"), &format!(" {key}"))
    }

    fn read(shown: &str) -> Option<(String, i64, SystemTime)> {
        /// The number of digits of the Unix time until the year 2286. A key may contain a shorter number.
        const DIGITS: usize = 10;

        // Searched from the end, because the name may contain the same form.
        shown.match_indices(' ').rev().find_map(|(at, _)| {
            let (name, rest) = (shown.get(..at)?, shown.get(at + 1..)?);
            let (word, _) = rest.split_once(' ').unwrap_or((rest, ""));
            let (term, since) = word.split_once('@').filter(|(_, since)| since.len() == DIGITS)?;
            let since = UNIX_EPOCH.checked_add(Duration::from_secs(since.parse().ok()?))?;
            Some((name.to_owned(), term.parse().ok()?, since))
        })
    }
}

impl From<Holder> for Leader {
    fn from(holder: Holder) -> Self {
        let Holder { backend_pid, application_name, client_addr } = holder;
        let (name, term, since) = match Self::read(&application_name) {
            Some((name, term, since)) => (name, Some(term), Some(since)),
            None => (application_name, None, None),
        };
        Self { name, term, since, backend_pid, client_addr }
    }
}

/// Observes which candidate leads: made by [`Election::observe`].
///
/// A [`Stream`] of the leaders: the present one first (`None` if there is none), then each change. It queries the
/// server every half second after a change, and less often the longer nothing changes: every 5 s after a minute. So a
/// change is seen at most 5 s late, and a leader whose term begins and ends between two queries is not seen. The stream
/// has no end, and continues after an error. [`changed`](Self::changed) returns the same leaders without a stream.
///
/// Nothing runs in the background: an observer that is not polled sends nothing.
///
/// # Drop
///
/// Leaves nothing behind. A statement that is in flight is dropped with its connection.
///
/// # Cancel safety
///
/// Between two polls, the stream keeps a statement that is in flight, and its pooled connection. If the
/// task does something else meanwhile that needs a connection, prefer [`changed`](Self::changed): when its future
/// is dropped, it keeps no connection.
///
/// # Panics
///
/// If polled outside a tokio runtime.
///
/// # Examples
///
/// With the combinators of `tokio_stream`, or of `futures`:
///
/// ```
/// use pglock::Election;
/// use tokio_stream::StreamExt;
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
/// # let pool = pglock_testkit::pool().await;
/// let mut election = Election::new(&pool, "billing").candidate("node-7");
/// let _leadership = election.campaign().await?;
///
/// let mut leaders = election.observe();
/// while let Some(leader) = leaders.next().await {
///     match leader {
///         Ok(Some(leader)) => println!("{} leads", leader.name),
///         Ok(None) => println!("no candidate leads"),
///         Err(error) if error.is_transient() => eprintln!("{error}"),
///         Err(error) => return Err(error),
///     }
/// #   break;
/// }
/// # Ok(()) }
/// ```
#[must_use = "streams do nothing unless polled"]
pub struct Observer {
    pool: PgPool,
    key: Key,
    /// When the next lookup is due. `None` before the first lookup, which is due at once.
    due: Option<Instant>,
    /// When the result of a lookup last differed from that of the lookup before, or was an error.
    changed_at: Instant,
    /// The lookup in flight. The mutex is never locked: it makes the observer `Sync`.
    look: Mutex<Option<Look>>,
    /// Whether anything was returned to the caller yet. `seen` is the leader that was returned last.
    told: bool,
    seen: Option<Leader>,
    /// The leader that the last lookup found.
    glimpsed: Option<Leader>,
}

type Look = Pin<Box<dyn Future<Output = Result<Option<Leader>>> + Send>>;

impl Observer {
    pub(super) fn new(pool: PgPool, key: Key) -> Self {
        Self {
            pool,
            key,
            due: None,
            changed_at: Instant::now(),
            look: Mutex::default(),
            told: false,
            seen: None,
            glimpsed: None,
        }
    }

    /// Returns the leader: immediately the first time, and from then on when it has changed. Returns `None` if no
    /// candidate leads. Equivalent to the next item of the stream, without [`Stream`].
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: the next call returns the change. A statement that is in flight is dropped with its connection.
    ///
    /// # Errors
    ///
    /// As for [`Election::leader`]. After an error, the next call queries the server half a second later.
    ///
    /// # Panics
    ///
    /// If called outside a tokio runtime.
    ///
    /// # Examples
    ///
    /// As for [`Election::observe`].
    pub async fn changed(&mut self) -> Result<Option<Leader>> {
        /// Drops the lookup in flight when the call is dropped.
        struct Call<'a>(&'a mut Observer);

        impl Drop for Call<'_> {
            fn drop(&mut self) {
                *self.0.look() = None;
            }
        }

        let call = Call(self);
        poll_fn(|cx| call.0.poll_changed(cx)).await
    }

    fn poll_changed(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Leader>>> {
        loop {
            let (pool, key, due) = (self.pool.clone(), self.key.clone(), self.due);
            let look = self.look().get_or_insert_with(|| {
                Box::pin(async move {
                    if let Some(due) = due {
                        tokio::select! {
                            () = sleep_until(due) => {}
                            // The close of the pool is reported at once, and from then on after each pause.
                            () = pool.close_event(), if !pool.is_closed() => {}
                        }
                    }
                    leader(&pool, &key).await
                })
            });
            let looked = ready!(look.as_mut().poll(cx));
            *self.look() = None;
            let now = Instant::now();
            if !looked.as_ref().is_ok_and(|leader| *leader == self.glimpsed) {
                self.changed_at = now;
            }
            self.due = Some(now + pause(now - self.changed_at));
            let leader = looked?;
            // For a moment after an election, the server does not show the leader's name. A holder that is another
            // program never shows one.
            let settled = leader.as_ref().is_none_or(|leader| leader.term.is_some())
                || self.glimpsed == leader;
            self.glimpsed.clone_from(&leader);
            if settled && !(self.told && self.seen == leader) {
                self.told = true;
                self.seen.clone_from(&leader);
                return Poll::Ready(Ok(leader));
            }
        }
    }

    fn look(&mut self) -> &mut Option<Look> {
        self.look.get_mut().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Asks the server which candidate leads.
pub(super) async fn leader(pool: &PgPool, key: &Key) -> Result<Option<Leader>> {
    let pooled = lend(pool, key, WaitPolicy::Forever, Instant::now().into()).await?;
    let mut conn = Conn::new(pooled, Handle::current(), None);
    let holder = within(DEADLINE, async { sql::election::holder(conn.pg()?, key.id()).await });
    let holder = holder.await.map_err(|source| Error::database(key, source))?;
    conn.give_back();
    Ok(holder.map(Leader::from))
}

/// Returns the pause before the next lookup, from the time for which nothing has changed.
fn pause(unchanged: Duration) -> Duration {
    (unchanged / 10).clamp(SHORTEST_PAUSE, LONGEST_PAUSE)
}

impl Stream for Observer {
    type Item = Result<Option<Leader>>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.get_mut().poll_changed(cx).map(Some)
    }
}

impl fmt::Debug for Observer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Observer")
            .field("key", &self.key)
            .field("seen", &self.seen)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_are_less_frequent_the_longer_nothing_changes() {
        let (mut time, mut looks) = (Duration::ZERO, 0);
        while time < Duration::from_mins(10) {
            time += pause(time);
            looks += 1;
        }
        // Ten in the first 5 s, 24 until 50 s, and one every 5 s from then on.
        assert!((140..150).contains(&looks), "{looks}");
    }

    #[test]
    fn a_leader_is_read_back_as_it_was_shown() {
        let since = UNIX_EPOCH + Duration::from_secs(1_764_000_007);
        for (name, shown_name) in [
            ("node-7", "node-7"),
            ("two words", "two words"),
            ("", ""),
            ("it's mine 1@2", "it's mine 1@2"),
            (&"long-".repeat(20), &"long-".repeat(20)[..41]),
            ("café \n\0", "caf? ??"),
            (&"é".repeat(50), &"?".repeat(41)),
        ] {
            let shown = Leader::show(name, 4_711_000_000, since, &Key::from("jobs"));
            assert!(shown.len() <= 63, "{shown}");
            assert_eq!(shown.ends_with(" jobs"), name.chars().count() < 30, "{shown}");
            let read = Leader::read(&shown);
            assert_eq!(read, Some((shown_name.to_owned(), 4_711_000_000, since)));
        }
        let shown = Leader::show("node-7", 17, since, &Key::from("1@2"));
        assert_eq!(Leader::read(&shown), Some(("node-7".to_owned(), 17, since)));
        let long = Key::from("a key ".repeat(20));
        let shown = Leader::show("node-7", 17, since, &long);
        assert_eq!(Leader::read(&shown), Some(("node-7".to_owned(), 17, since)));
        assert_eq!(Leader::read("psql"), None);
        assert_eq!(Leader::read("a b@c"), None);
    }
}
