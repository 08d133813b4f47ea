//! How to use it, what it promises, and how to run it: pages to read.
//!
//! This module is made for the documentation, and holds nothing else.
//!
//! | page | answers |
//! |---|---|
//! | [cookbook] | How do I …? Tasks, each with code to copy; and how to move here from another library |
//! | [guarantees] | What can I rely on, and what not? Loss, fencing, isolation, failover, clocks, poolers |
//! | [faults] | What happens when something breaks? Each row is a test |
//! | [operations] | How do I run it? Pools, settings, monitoring, queries for `psql` |
//! | [deploying] | How do I deploy it? systemd, containers, Kubernetes: shutdown, probes, time-outs |
//! | [servers] | Where do locks exclude? Versions, managed services, other servers, poolers, scale to zero |
//! | [cost] | What does it cost, and how does that grow? Connections, memory, statements, the server's limits; more than one server |
//! | [comparison] | What else is there, and when is that the better choice? |
//! | [program] | How do I use locks in a shell, in cron and under systemd? |
//! | [architecture] | How does it work inside? Modules, who owns the connection, the life of an acquire |
//!
//! The code on these pages is compiled and run by the tests, against a real server. So are the queries
//! for `psql`.

#[doc = include_str!("guide/cookbook.md")]
pub mod cookbook {}

#[doc = include_str!("guide/guarantees.md")]
pub mod guarantees {}

#[doc = include_str!("guide/faults.md")]
pub mod faults {}

#[doc = include_str!("guide/operations.md")]
pub mod operations {}

#[doc = include_str!("guide/deploying.md")]
pub mod deploying {}

#[doc = include_str!("guide/servers.md")]
pub mod servers {}

#[doc = include_str!("guide/cost.md")]
pub mod cost {}

#[doc = include_str!("guide/comparison.md")]
pub mod comparison {}

#[doc = include_str!("guide/program.md")]
pub mod program {}

#[doc = include_str!("guide/architecture.md")]
pub mod architecture {}
