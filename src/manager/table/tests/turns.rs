//! The turns of the keys that wait in the line for a place in the server's queue.

use std::time::{Duration, Instant};

use super::super::Table;
use super::super::line::LAST_SLICE;
use super::SHARED_SESSION;
use super::model::{Session, World};
use crate::key::KeyId;
use crate::metrics::Waiting;
use crate::mode::Mode;

/// Requests a key, which the server refuses, so that it enters the line.
fn refuse(table: &mut Table<Session, u64>, key: KeyId, now: Instant) {
    table.want(key, 0, (Mode::Exclusive, true), || (99, Waiting::default()), now);
    let lock = table.take(key, true).unwrap();
    table.taken(key, lock.id, (&SHARED_SESSION, false), now);
}

/// Lets one wait session wait in vain. Returns the key, and how long the session waited for it.
fn turn(table: &mut Table<Session, u64>, now: &mut Instant) -> (KeyId, Duration) {
    let (key, wait, slice) = table.take_wait(*now).unwrap();
    *now += slice;
    assert!(table.not_granted(key, wait.id, *now));
    (key, slice)
}

/// However long the server's queue for a key takes, one of the key's turns lasts as long.
#[test]
fn a_key_that_waits_for_longer_gets_longer_turns() {
    for keys in [1, 2, 10] {
        let World { mut table, mut now, .. } = World::new();
        for key in 0..keys {
            refuse(&mut table, KeyId::BigInt(key), now);
        }
        let begun = now;
        for needed in [1, 5, 60].map(Duration::from_secs) {
            let bound = 9 * needed + Duration::from_mins(2) * u32::try_from(keys).unwrap();
            while turn(&mut table, &mut now).1 < needed {
                assert!(now - begun <= bound, "{keys} keys, {needed:?}");
            }
        }
        let longest = (0..100).map(|_| turn(&mut table, &mut now).1).max();
        assert_eq!(longest, Some(LAST_SLICE));
    }
}

/// A key that the server grants soon does not wait for the turns of all keys that other sessions hold for hours.
#[test]
fn a_new_key_has_its_first_turns_soon() {
    let World { mut table, mut now, .. } = World::new();
    for key in 0..20 {
        refuse(&mut table, KeyId::BigInt(key), now);
    }
    now += Duration::from_hours(1);
    for _ in 0..20 {
        turn(&mut table, &mut now);
    }
    let new = KeyId::BigInt(20);
    refuse(&mut table, new, now);
    let turns = [(); 6].map(|()| turn(&mut table, &mut now));
    let of_it = turns.iter().filter(|(key, _)| *key == new).count();
    assert!(of_it >= 2, "{turns:?}");
}
