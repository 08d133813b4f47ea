//! Replaces the metrics if the feature `metrics` is off. The functions do nothing.

#![expect(
    clippy::needless_pass_by_ref_mut,
    clippy::unused_self,
    reason = "the same signatures as with the feature"
)]

use std::time::Instant;

use crate::error::Loss;
use crate::key::Key;
use crate::mode::Mode;

#[derive(Clone)]
pub(crate) struct Labels {}

impl Labels {
    pub(crate) fn new(_: bool, _: bool, _: &Key, _: Mode) -> Self {
        Self {}
    }
}

pub(crate) struct Acquire {}

impl Acquire {
    pub(crate) fn start(_: Labels) -> Self {
        Self {}
    }

    pub(crate) fn end<T, E>(self, _: &Result<Option<T>, E>, _: bool) {}
}

#[derive(Default)]
pub(crate) struct Waiting {}

impl Waiting {
    pub(crate) fn new(_: Labels) -> Self {
        Self {}
    }

    pub(crate) fn start(&mut self) {}
}

pub(crate) struct Held {}

impl Held {
    pub(crate) fn start(_: &Labels) -> Self {
        Self {}
    }

    pub(crate) fn end(&mut self) {}
}

pub(crate) struct One {}

pub(crate) fn connection() -> One {
    One {}
}

pub(crate) fn queued() -> One {
    One {}
}

#[derive(Default)]
pub(crate) struct Leading {}

impl Leading {
    pub(crate) fn start(&self, _: &Labels) {}

    pub(crate) fn end(&self) {}
}

pub(crate) fn candidate(_: &Labels) {}

pub(crate) fn lost(_: &Loss, _: usize) {}

pub(crate) fn abandoned(_: bool) {}

pub(crate) fn batch(_: usize) {}

pub(crate) fn heartbeat(_: Instant, _: impl FnOnce() -> Instant) {}

pub(crate) fn update(_: impl FnOnce()) {}
