//! Who waits for whom, as a tree.

use pglock::inspect::LockInfo;

/// A row of the tree: a holder, or a waiter below one that it waits for.
#[derive(Debug)]
pub(crate) struct Row<'l> {
    pub(crate) lock: &'l LockInfo,
    /// The branches that lead to it; empty for a holder.
    pub(crate) branches: String,
}

/// Puts each waiter below the first holder that it waits for; below a waiter if it waits for no holder.
///
/// The locks are ordered by key, and the holders of each come first, as the library returns them.
pub(crate) fn tree(locks: &[LockInfo]) -> Vec<Row<'_>> {
    let mut roots = Vec::new();
    let mut children = vec![Vec::new(); locks.len()];
    for (place, lock) in locks.iter().enumerate() {
        match parent(locks, place, lock).and_then(|parent| children.get_mut(parent)) {
            Some(siblings) => siblings.push(place),
            None => roots.push(place),
        }
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

/// The place of the one below which a lock is shown.
fn parent(locks: &[LockInfo], place: usize, lock: &LockInfo) -> Option<usize> {
    let pid = |other: &LockInfo| other.session.as_ref().map_or(0, |session| session.backend_pid);
    // What is below one ahead of it can't be above itself.
    let ahead = locks.iter().enumerate().take(place);
    let mut blockers =
        ahead.filter(|(_, other)| other.key == lock.key && lock.blocked_by.contains(&pid(other)));
    // Holders come first.
    blockers.next().map(|(place, _)| place)
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
