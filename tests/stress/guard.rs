//! The kinds of guards as one type.

use pglock::{
    Error, ExclusiveGuard, Lock, Mode, MultiGuard, Result, SessionConnection, SharedGuard, Upgrade,
};

#[derive(Debug)]
pub(crate) enum Guard {
    Exclusive(ExclusiveGuard),
    Multi(MultiGuard),
    Shared(SharedGuard),
}

macro_rules! of_any {
    ($guard:expr, $bound:ident => $call:expr) => {
        match $guard {
            Guard::Exclusive($bound) => $call,
            Guard::Multi($bound) => $call,
            Guard::Shared($bound) => $call,
        }
    };
}

impl Guard {
    pub(crate) fn backend_pid(&self) -> i32 {
        of_any!(self, guard => guard.backend_pid())
    }

    pub(crate) fn is_lost(&self) -> bool {
        of_any!(self, guard => guard.is_lost())
    }

    /// Returns the numbers of the keys and the modes in which they are held.
    pub(crate) fn locks(&self) -> Vec<(u64, Mode)> {
        match self {
            Self::Exclusive(guard) => vec![(number(guard.key()), Mode::Exclusive)],
            Self::Multi(guard) => guard.keys().map(|(key, mode)| (number(key), mode)).collect(),
            Self::Shared(guard) => vec![(number(guard.key()), Mode::Shared)],
        }
    }

    /// Makes a handle on the same session, if the kind of guard supports it.
    pub(crate) fn lock(&self, key: u64) -> Option<Lock> {
        let key = i64::try_from(key).ok()?;
        match self {
            Self::Exclusive(guard) => Some(Lock::new(guard, key)),
            Self::Multi(_) => None,
            Self::Shared(guard) => Some(Lock::new(guard, key)),
        }
    }

    pub(crate) async fn verify(&self) -> Result<()> {
        of_any!(self, guard => guard.verify().await)
    }

    pub(crate) async fn fencing_token(&self) -> Result<i64> {
        of_any!(self, guard => guard.fencing_token().await)
    }

    pub(crate) async fn connection(&self) -> Result<SessionConnection<'_>> {
        of_any!(self, guard => guard.connection().await)
    }

    pub(crate) async fn while_held<T>(&self, future: impl Future<Output = T>) -> Result<T> {
        of_any!(self, guard => guard.while_held(future).await)
    }

    pub(crate) async fn release(self) -> Result<()> {
        of_any!(self, guard => guard.release().await)
    }

    /// Downgrades the guard, or tries to upgrade it. Returns the resulting guard.
    pub(crate) async fn convert(self) -> Result<Self, Error> {
        Ok(match self {
            Self::Exclusive(guard) => Self::Shared(guard.downgrade().await?),
            Self::Multi(guard) => Self::Multi(guard),
            Self::Shared(guard) => {
                let upgrade = guard.try_upgrade().await?;
                match upgrade {
                    Upgrade::Upgraded(guard) => Self::Exclusive(guard),
                    Upgrade::Refused(guard) => Self::Shared(guard),
                }
            }
        })
    }
}

impl From<ExclusiveGuard> for Guard {
    fn from(guard: ExclusiveGuard) -> Self {
        Self::Exclusive(guard)
    }
}

impl From<MultiGuard> for Guard {
    fn from(guard: MultiGuard) -> Self {
        Self::Multi(guard)
    }
}

impl From<SharedGuard> for Guard {
    fn from(guard: SharedGuard) -> Self {
        Self::Shared(guard)
    }
}

/// All keys of this test are numbers.
fn number(key: &pglock::Key) -> u64 {
    key.to_string().parse().expect("a key that is a number is shown as one")
}
