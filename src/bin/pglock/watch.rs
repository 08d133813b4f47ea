//! `pglock ls --watch` in a terminal: shows the list on the whole screen, and restores the screen at the end.

use std::io::{self, Write, stdout};
use std::thread;
use std::time::{Duration, SystemTime};

use crossterm::cursor::{Hide, MoveTo, Show};
use crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use crossterm::style::Print;
use crossterm::terminal::{
    Clear, ClearType, EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode,
    enable_raw_mode, size,
};
use crossterm::{execute, queue};
use nix::sys::signal::{Signal, raise};
use pglock::Key;
use pglock::inspect::LockInfo;
use sqlx::PgConnection;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::sleep;

use crate::acquire::clock;
use crate::database::Database;
use crate::exit::{Exit, Failure, chain};
use crate::known::Tools;
use crate::ls;
use crate::show;
use crate::signals::Signals;
use crate::table;
use crate::tree::{self, Row};

/// Shows the locks until a key or a signal ends it.
pub(crate) async fn run(
    database: &Database,
    keys: &[Key],
    interval: Duration,
) -> Result<Exit, Failure> {
    let mut signals = Signals::listen()?;
    let mut conn = Some(database.connect().await?);
    let mut screen = Some(Screen::enter().map_err(no_screen)?);
    let mut input = read_input();
    let mut view = View { database: database.name().to_owned(), ..View::default() };
    let mut pause = Duration::ZERO;
    loop {
        // A refresh that fails is retried, and keys are handled meanwhile.
        let wait = pause;
        let refresh = async {
            sleep(wait).await;
            let locks = fetch(database, keys, &mut conn).await;
            (locks, SystemTime::now())
        };
        tokio::pin!(refresh);
        let (locks, time) = loop {
            tokio::select! {
                biased;
                received = signals.next() => return Ok(received.signal.into()),
                Some(input) = input.recv() => {
                    if let Some(exit) = view.react(&input, &mut screen).map_err(no_screen)? {
                        return Ok(exit);
                    }
                }
                refreshed = &mut refresh => break refreshed,
            }
        };
        view.update(locks, time);
        view.draw().map_err(no_screen)?;
        pause = interval;
    }
}

fn no_screen(error: io::Error) -> Failure {
    Failure::System("cannot use the terminal", error)
}

/// Fetches the locks on the connection, or on a new one if the last fetch has failed.
async fn fetch(
    database: &Database,
    keys: &[Key],
    conn: &mut Option<PgConnection>,
) -> Result<Vec<LockInfo>, Failure> {
    let mut open = match conn.take() {
        Some(open) => open,
        None => database.connect().await?,
    };
    let locks = ls::locks(&mut open, keys).await?;
    *conn = Some(open);
    Ok(locks)
}

/// The alternate screen of the terminal.
///
/// # Drop
///
/// Restores the normal screen.
struct Screen;

impl Screen {
    fn enter() -> io::Result<Self> {
        enable_raw_mode()?;
        let screen = Self;
        execute!(stdout(), EnterAlternateScreen, Hide)?;
        Ok(screen)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        execute!(stdout(), Show, LeaveAlternateScreen).ok();
        disable_raw_mode().ok();
    }
}

/// Reads keys and changes of the size, on a thread that ends with the program.
fn read_input() -> UnboundedReceiver<Event> {
    let (sender, input) = unbounded_channel();
    thread::spawn(move || {
        while let Ok(event) = event::read() {
            if sender.send(event).is_err() {
                return;
            }
        }
    });
    input
}

/// The order in which the locks are shown.
#[derive(Clone, Copy, Debug, Default)]
enum Order {
    #[default]
    Key,
    LongestWait,
    OldestSession,
}

/// The content of the screen.
#[derive(Debug, Default)]
struct View {
    database: String,
    order: Order,
    /// How many rows are above the screen.
    offset: usize,
    locks: Vec<LockInfo>,
    /// When the locks were fetched.
    time: Option<SystemTime>,
    failure: Option<String>,
}

impl View {
    fn update(&mut self, locks: Result<Vec<LockInfo>, Failure>, time: SystemTime) {
        match locks {
            Ok(locks) => {
                (self.locks, self.time, self.failure) = (locks, Some(time), None);
            }
            Err(failure) => self.failure = Some(chain(&failure)),
        }
    }

    /// Handles a key or a resize, and draws the screen. Returns the exit code if the key quits the program.
    #[expect(clippy::wildcard_enum_match_arm, reason = "other keys do nothing")]
    fn react(&mut self, event: &Event, screen: &mut Option<Screen>) -> io::Result<Option<Exit>> {
        if let Event::Key(KeyEvent { code, modifiers, kind: KeyEventKind::Press, .. }) = *event {
            let page = usize::from(size()?.1).saturating_sub(3).max(1);
            let is_control = modifiers.contains(KeyModifiers::CONTROL);
            match code {
                KeyCode::Char('c') if is_control => return Ok(Some(Signal::SIGINT.into())),
                KeyCode::Char('z') if is_control => {
                    drop(screen.take());
                    raise(Signal::SIGTSTP)?;
                    *screen = Some(Screen::enter()?);
                }
                KeyCode::Char('q') | KeyCode::Esc => return Ok(Some(Exit::FINE)),
                KeyCode::Char('s') => {
                    self.order = match self.order {
                        Order::Key => Order::LongestWait,
                        Order::LongestWait => Order::OldestSession,
                        Order::OldestSession => Order::Key,
                    };
                    self.offset = 0;
                }
                KeyCode::Up | KeyCode::Char('k') => self.offset = self.offset.saturating_sub(1),
                KeyCode::Down | KeyCode::Char('j') => self.offset += 1,
                KeyCode::PageUp => self.offset = self.offset.saturating_sub(page),
                KeyCode::PageDown | KeyCode::Char(' ') => self.offset += page,
                KeyCode::Home => self.offset = 0,
                KeyCode::End => self.offset = usize::MAX,
                _ => return Ok(None),
            }
        }
        self.draw()?;
        Ok(None)
    }

    fn draw(&mut self) -> io::Result<()> {
        let (width, height) = size()?;
        let (width, height) = (usize::from(width), usize::from(height));
        let tools = Tools::of(&self.database);
        let rows: Vec<_> = self.rows().iter().map(|row| show::cells(row, &tools)).collect();
        let room = height.saturating_sub(2);
        self.offset = self.offset.min(rows.len().saturating_sub(room));
        let text = table::lay_out(show::HEADLINE, &rows, Some(width));
        let mut lines = text.lines();
        let headline = lines.next().unwrap_or_default();
        let mut out = stdout().lock();
        queue!(out, MoveTo(0, 0))?;
        let status = table::shorten(&self.status(rows.len(), room), width);
        let shown = [&*status, headline].into_iter();
        for (number, line) in shown.chain(lines.skip(self.offset)).take(height).enumerate() {
            let separator = if number == 0 { "" } else { "\r\n" };
            queue!(out, Print(separator), Print(line), Clear(ClearType::UntilNewLine))?;
        }
        queue!(out, Clear(ClearType::FromCursorDown))?;
        out.flush()
    }

    fn rows(&self) -> Vec<Row<'_>> {
        let mut locks: Vec<&LockInfo> = self.locks.iter().collect();
        let started = |lock: &LockInfo| lock.session.as_ref().and_then(|s| s.started_at);
        match self.order {
            Order::Key => return tree::tree(&self.locks),
            // Waiters first.
            Order::LongestWait => locks.sort_by_key(|lock| (lock.held, lock.waiting_since)),
            Order::OldestSession => locks.sort_by_key(|lock| started(lock)),
        }
        locks.into_iter().map(|lock| Row { lock, branches: String::new() }).collect()
    }

    fn status(&self, rows: usize, room: usize) -> String {
        if let Some(failure) = &self.failure {
            return format!("{}  {failure}", clock(SystemTime::now()));
        }
        let waiting = self.locks.iter().filter(|lock| !lock.held).count();
        let held = self.locks.len() - waiting;
        let order = match self.order {
            Order::Key => "by key",
            Order::LongestWait => "longest wait first",
            Order::OldestSession => "oldest session first",
        };
        let time = self.time.map(clock).unwrap_or_default();
        let mut status =
            format!("{time}  {}: {held} held, {waiting} waiting, {order}", self.database);
        if rows > room {
            let last = (self.offset + room).min(rows);
            status = format!("{status}  rows {} to {last}", self.offset + 1);
        }
        // The keys come first, because a narrow screen cuts off the end.
        format!("q quits, s sorts | {status}")
    }
}
