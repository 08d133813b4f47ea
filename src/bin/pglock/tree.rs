//! Arranges holders and waiters as a tree.

use std::collections::HashMap;

use pglock::inspect::LockInfo;

/// A row of the tree: a holder, or a waiter below one that it waits for.
#[derive(Debug)]
pub(crate) struct Row<'l> {
    pub(crate) lock: &'l LockInfo,
    /// The branches that lead to it; empty for a holder.
    pub(crate) branches: String,
}

/// Puts each waiter below the first holder that it waits for, or below another waiter if it waits for no holder.
///
/// Expects the locks in the order in which the library returns them: by key, and the holders of each key first.
pub(crate) fn tree(locks: &[LockInfo]) -> Vec<Row<'_>> {
    let mut roots = Vec::new();
    let mut children = vec![Vec::new(); locks.len()];
    let mut places = HashMap::new();
    let mut group = None;
    for (place, lock) in locks.iter().enumerate() {
        if group != Some(&lock.key) {
            places.clear();
            group = Some(&lock.key);
        }
        // Only an earlier row can be the parent, so there are no cycles. The first is a holder if a holder blocks this
        // waiter.
        let parent = lock.blocked_by.iter().filter_map(|pid| places.get(pid)).min();
        match parent.and_then(|&parent: &usize| children.get_mut(parent)) {
            Some(siblings) => siblings.push(place),
            None => roots.push(place),
        }
        let pid = lock.session.as_ref().map_or(0, |session| session.backend_pid);
        places.entry(pid).or_insert(place);
    }
    let mut rows = Vec::new();
    for root in roots {
        if let Some(lock) = locks.get(root) {
            rows.push(Row { lock, branches: String::new() });
        }
        grow(locks, &children, root, "", &mut rows);
    }
    rows
}

fn grow<'l>(
    locks: &'l [LockInfo],
    children: &[Vec<usize>],
    place: usize,
    indent: &str,
    rows: &mut Vec<Row<'l>>,
) {
    let below = children.get(place).map_or(&[][..], Vec::as_slice);
    for (left, &child) in (0..below.len()).rev().zip(below) {
        let (branch, deeper) = if left == 0 { ("└─ ", "   ") } else { ("├─ ", "│  ") };
        if let Some(lock) = locks.get(child) {
            rows.push(Row { lock, branches: format!("{indent}{branch}") });
        }
        grow(locks, children, child, &format!("{indent}{deeper}"), rows);
    }
}
