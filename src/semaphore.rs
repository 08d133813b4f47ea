//! A number of permits, shared by all processes.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use sqlx::PgPool;
use tokio::time::{sleep, timeout_at};

use crate::error::{Error, Result};
use crate::held::{Held, methods};
use crate::key::{Key, KeyId};
use crate::mode::Mode;
use crate::options::LockOptions;
use crate::owner::Owner;
use crate::request::Request;

/// A semaphore: up to so many hold a permit at a time, in all processes together.
///
/// Each permit is an advisory lock of its own, so a permit goes back when its holder dies, as a lock
/// does; and each has a number, its [`slot`](Permit::slot), so that a semaphore is also a pool of
/// numbered things: ports, licences, workers.
///
/// Who waits, waits in order of arrival: the tasks of a process in the process, and one of them in the
/// server's queue. The first in that queue looks for a free permit every 20 ms, and nobody else does.
/// `try_acquire` does not overtake them.
///
/// A clone is the same semaphore. A permit uses one connection of the pool, and all who wait in a
/// process use one together.
///
/// # Limits
///
/// At most 1024 permits. All who use a semaphore must give it the same number; a permit that is held
/// under another number is noticed by those who acquire after it, and is an [`Error::Options`].
///
/// # Examples
///
/// ```
/// use pglock::Semaphore;
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
/// # let pool = pglock_testkit::pool().await;
/// let printers = Semaphore::new(&pool, "printers", 3)?;
/// let permit = printers.acquire().await?;
/// println!("printing on printer {} of 3", permit.slot());
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Semaphore {
    inner: Arc<Inner>,
}

struct Inner {
    key: Key,
    permits: usize,
    /// Held exclusively by the first who waits, and shared for a moment by who only tries.
    queue: Key,
    slots: Request,
    owner: Owner,
    /// Those of this process who wait. The first of them waits on the server.
    waiting: tokio::sync::Mutex<()>,
    /// When it was last asked whether others count the permits differently.
    counted: Mutex<Option<Instant>>,
}

/// More than this want a counter in a table.
const MOST: usize = 1024;

/// How often the first who waits looks for a free permit.
const LOOK: Duration = Duration::from_millis(20);

/// How often it is asked whether others count the permits differently: `pg_locks` is not for every
/// acquire.
const COUNT: Duration = Duration::from_secs(1);

impl Semaphore {
    /// Makes a semaphore with the default options. Sends nothing to the server.
    ///
    /// # Errors
    ///
    /// [`Error::Options`] if `permits` is not from 1 to 1024.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::Semaphore;
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() {
    /// # let pool = pglock_testkit::pool().await;
    /// assert!(Semaphore::new(&pool, "printers", 3).is_ok());
    /// assert!(Semaphore::new(&pool, "printers", 0).is_err());
    /// # }
    /// ```
    pub fn new(pool: &PgPool, key: impl Into<Key>, permits: usize) -> Result<Self> {
        Self::with_owner(key.into(), permits, Owner::new(pool, LockOptions::new()))
    }

    pub(crate) fn with_owner(key: Key, permits: usize, owner: Owner) -> Result<Self> {
        if !(1..=MOST).contains(&permits) {
            let reason =
                format!("a semaphore of {permits} permits; the number must be from 1 to {MOST}");
            return Err(Error::Options { key, reason });
        }
        let name = display_name(&key);
        let slots = (0..permits).map(|slot| slot_key(&key, &name, permits, slot));
        let inner = Inner {
            queue: queue_key(&key, &name),
            slots: Request::any(slots.collect()),
            permits,
            key,
            owner,
            waiting: tokio::sync::Mutex::default(),
            counted: Mutex::default(),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Returns the key.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::{Key, Semaphore};
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// assert_eq!(Semaphore::new(&pool, 42, 3)?.key(), &Key::from(42));
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn key(&self) -> &Key {
        &self.inner.key
    }

    /// Returns how many permits there are, held or not.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::Semaphore;
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// assert_eq!(Semaphore::new(&pool, "printers", 3)?.permits(), 3);
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn permits(&self) -> usize {
        self.inner.permits
    }

    /// Acquires a permit, and waits for as long as none is free.
    ///
    /// Three statements if one is free.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: you lose your place in the queue, and leave nothing behind.
    ///
    /// # Errors
    ///
    /// As for [`Lock::acquire`](crate::Lock::acquire); and [`Error::Options`] if a permit is held under
    /// another number of permits. If the connection breaks that waits, another goes on, at the end of
    /// the queue.
    ///
    /// # Panics
    ///
    /// If called outside a tokio runtime.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::Semaphore;
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let printers = Semaphore::new(&pool, "printers", 3)?;
    /// let _permit = printers.acquire().await?;
    /// // At most three are here, on all machines together.
    /// # Ok(()) }
    /// ```
    pub async fn acquire(&self) -> Result<Permit> {
        let _first = self.inner.waiting.lock().await;
        loop {
            // Without a deadline, it never ends in `None`.
            let permit = self.inner.wait(None).await?;
            if let Some(permit) = permit {
                return Ok(permit);
            }
        }
    }

    /// Acquires a permit if one is free, and nobody waits for it. `None` otherwise.
    ///
    /// # Cancel safety
    ///
    /// As for [`acquire`](Self::acquire).
    ///
    /// # Errors
    ///
    /// As for [`acquire`](Self::acquire).
    ///
    /// # Panics
    ///
    /// If called outside a tokio runtime.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::Semaphore;
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let printers = Semaphore::new(&pool, "printers", 1)?;
    /// let permit = printers.try_acquire().await?;
    /// assert!(permit.is_some());
    /// assert!(printers.try_acquire().await?.is_none());
    /// # Ok(()) }
    /// ```
    pub async fn try_acquire(&self) -> Result<Option<Permit>> {
        self.inner.pass(None).await
    }

    /// Acquires a permit, and waits for at most `timeout`. `None` if that passes.
    ///
    /// # Cancel safety
    ///
    /// As for [`acquire`](Self::acquire).
    ///
    /// # Errors
    ///
    /// As for [`acquire`](Self::acquire).
    ///
    /// # Panics
    ///
    /// If called outside a tokio runtime.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::Semaphore;
    /// use std::time::Duration;
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let printers = Semaphore::new(&pool, "printers", 1)?;
    /// let _permit = printers.acquire().await?;
    /// let policy = Duration::from_millis(50);
    /// assert!(printers.try_acquire_for(policy).await?.is_none());
    /// # Ok(()) }
    /// ```
    pub async fn try_acquire_for(&self, timeout: Duration) -> Result<Option<Permit>> {
        let Some(deadline) = Instant::now().checked_add(timeout) else {
            return self.acquire().await.map(Some);
        };
        if timeout.is_zero() {
            return self.try_acquire().await;
        }
        let waiting = &self.inner.waiting;
        let (_first, queued) = match waiting.try_lock() {
            Ok(first) => (first, false),
            Err(_) => match timeout_at(deadline.into(), waiting.lock()).await {
                Ok(first) => (first, true),
                Err(_) => return Ok(None),
            },
        };
        let late = queued && deadline.saturating_duration_since(Instant::now()) < LOOK;
        match self.inner.wait(Some(deadline)).await {
            // Its time has gone by in the queue: it has missed a permit, not a connection, which is still on
            // its way back from who was first before.
            Err(Error::Pool { source: sqlx::Error::PoolTimedOut, .. }) if late => Ok(None),
            found => found,
        }
    }
}

impl Inner {
    /// Takes a permit that is free, if nobody waits for one.
    async fn pass(&self, deadline: Option<Instant>) -> Result<Option<Permit>> {
        let request = Request::one(&self.queue, Mode::Shared);
        let mut owner = self.owner.another();
        let passing = match deadline {
            None => owner.try_acquire(&request).await?,
            Some(deadline) => owner.try_acquire_by(&request, deadline).await?,
        };
        match passing {
            Some(passing) => self.look(&passing).await,
            None => Ok(None),
        }
    }

    /// Takes a permit, or waits for one. For the first who waits in this process.
    async fn wait(&self, deadline: Option<Instant>) -> Result<Option<Permit>> {
        loop {
            // Boxed, or the future of an acquire would be a large one.
            match Box::pin(self.wait_on_one_session(deadline)).await {
                // It held no permit, only a place in the queue.
                Err(Error::Disconnected { .. } | Error::Lost { .. }) => sleep(LOOK).await,
                found => return found,
            }
        }
    }

    /// Takes a permit, or waits in the server's queue, and then for a permit.
    async fn wait_on_one_session(&self, deadline: Option<Instant>) -> Result<Option<Permit>> {
        let left = || deadline.map(|at| at.saturating_duration_since(Instant::now()));
        let is_over = || left().is_some_and(|left| left.is_zero());
        let permit = self.pass(deadline).await?;
        if permit.is_some() {
            return Ok(permit);
        }
        let request = Request::one(&self.queue, Mode::Exclusive);
        let mut owner = self.owner.another();
        let first = match left() {
            None => Some(owner.acquire(&request).await?),
            Some(left) if left.is_zero() => None,
            Some(left) => owner.try_acquire_for(&request, left).await?,
        };
        let Some(first) = first else { return Ok(None) };
        let found = loop {
            match self.look(&first).await {
                Ok(None) if !is_over() => sleep(left().map_or(LOOK, |left| left.min(LOOK))).await,
                found => break found,
            }
        };
        // Awaited, or who tries next would find that somebody waits.
        let released = first.release().await;
        let found = found?;
        released.map(|()| found)
    }

    /// Takes a permit if one is free, on the session of who may look.
    async fn look(&self, may: &Held) -> Result<Option<Permit>> {
        let due = self.counted().is_none_or(|counted| counted.elapsed() > COUNT);
        if due {
            let other = may.session().other_count(&self.key, self.slots.key()).await?;
            if let Some(other) = other {
                let permits = self.permits;
                let reason = format!(
                    "a semaphore of {permits} permits here, and of {other} elsewhere; give all who \
                     use it the same number"
                );
                return Err(Error::Options { key: self.key.clone(), reason });
            }
            *self.counted.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        }
        let Some(held) = may.and(&self.slots).await? else { return Ok(None) };
        let slot = self.slots.locks().iter().position(|(key, _)| key == held.key());
        Ok(slot.map(|slot| Permit { held, slot, key: self.key.clone() }))
    }

    fn counted(&self) -> Option<Instant> {
        *self.counted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How many bits of a permit's key say how many there are, and how many its number: as many as
/// [`MOST`] needs. The others are a hash of the semaphore's key.
pub(crate) const BITS: u32 = 10;

fn slot_key(key: &Key, name: &str, permits: usize, slot: usize) -> Key {
    let number = |number: usize| i64::try_from(number).unwrap_or_default();
    let id = slot_hash(key) | number(permits - 1) << BITS | number(slot);
    Key::from(id).called(format!("{name}, permit {slot} of {permits}"))
}

/// What all keys of permits of a semaphore have in common.
fn slot_hash(key: &Key) -> i64 {
    // Of the key as the server knows it: the number 42 is not the name "42".
    let hashed = Key::from(format!("{}, semaphore", key.id()));
    let KeyId::BigInt(hash) = hashed.id() else { return 0 };
    hash >> (2 * BITS) << (2 * BITS)
}

fn queue_key(key: &Key, name: &str) -> Key {
    let queue = Key::from(format!("{}, queue of the semaphore", key.id()));
    queue.called(format!("{name}, queue of the semaphore"))
}

fn display_name(key: &Key) -> String {
    key.name().map_or_else(|| key.to_string(), str::to_owned)
}

/// Recognizes the keys of a semaphore's permits and queue.
pub(crate) struct Parts {
    semaphore: Key,
    name: String,
    queue: Key,
    hash: i64,
}

impl Parts {
    pub(crate) fn of(semaphore: Key) -> Self {
        let name = display_name(&semaphore);
        let (queue, hash) = (queue_key(&semaphore, &name), slot_hash(&semaphore));
        Self { semaphore, name, queue, hash }
    }

    /// The key under its name, if it is one of them.
    pub(crate) fn find(&self, key: &Key) -> Option<Key> {
        if key == &self.queue {
            return Some(self.queue.clone());
        }
        let KeyId::BigInt(id) = key.id() else { return None };
        let numbers = usize::try_from(id ^ self.hash).ok()?;
        let (permits, slot) = ((numbers >> BITS) + 1, numbers & (MOST - 1));
        let is_slot = slot < permits && permits <= MOST;
        is_slot.then(|| slot_key(&self.semaphore, &self.name, permits, slot))
    }
}

impl fmt::Debug for Semaphore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Semaphore")
            .field("key", &self.inner.key)
            .field("permits", &self.inner.permits)
            .finish_non_exhaustive()
    }
}

/// A permit of a semaphore that is held. Dropping it gives it back.
///
/// # Drop
///
/// As for [`ExclusiveGuard`](crate::ExclusiveGuard).
///
/// # Examples
///
/// ```
/// use pglock::Semaphore;
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
/// # let pool = pglock_testkit::pool().await;
/// let printers = Semaphore::new(&pool, "printers", 2)?;
/// let first = printers.acquire().await?;
/// let second = printers.acquire().await?;
/// assert_ne!(first.slot(), second.slot());
/// # Ok(()) }
/// ```
#[must_use = "if unused, the permit is given back at once"]
#[clippy::has_significant_drop]
pub struct Permit {
    held: Held,
    slot: usize,
    key: Key,
}

impl Permit {
    /// Returns the key of the semaphore.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::{Key, Semaphore};
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let permit = Semaphore::new(&pool, "printers", 2)?.acquire().await?;
    /// assert_eq!(permit.key(), &Key::from("printers"));
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn key(&self) -> &Key {
        &self.key
    }

    /// Returns the number of the permit, from 0, which nobody else has who holds one.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::Semaphore;
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
    /// # let pool = pglock_testkit::pool().await;
    /// let permit = Semaphore::new(&pool, "printers", 2)?.acquire().await?;
    /// assert_eq!(permit.slot(), 0);
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn slot(&self) -> usize {
        self.slot
    }
}

methods!(Permit, release, "Semaphore", "Semaphore::new(&pool, \"printers\", 2)?.acquire().await?");
