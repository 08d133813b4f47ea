//! The command line as a whole.

use clap::{Parser, Subcommand};

use crate::become_command::BecomeArgs;
use crate::completions::{CompletionsArgs, ManArgs};
use crate::doctor::DoctorArgs;
use crate::elect::ElectArgs;
use crate::key::KeyArgs;
use crate::kill::KillArgs;
use crate::ls::LsArgs;
use crate::run::RunArgs;
use crate::who::WhoArgs;

/// Locks for a shell, shared by every machine that can reach your PostgreSQL.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true, after_help = DATABASE, after_long_help = MORE)]
pub(crate) struct Cli {
    #[arg(long, env = "DATABASE_URL", hide_env_values = true, global = true)]
    #[arg(help = "The database, as postgres://user@host/database", long_help = URL)]
    pub(crate) url: Option<String>,

    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Run(RunArgs),
    Elect(ElectArgs),
    Ls(LsArgs),
    Who(WhoArgs),
    Kill(KillArgs),
    Key(KeyArgs),
    Doctor(DoctorArgs),
    Completions(CompletionsArgs),
    Man(ManArgs),
    #[command(hide = true)]
    Become(BecomeArgs),
}

const URL: &str = "\
The database, as postgres://user@host/database

Others can read the arguments of a process, so leave a password to PGPASSWORD, PGPASSFILE \
or DATABASE_URL.";

const DATABASE: &str = "\
The database is that of --url, or DATABASE_URL, or else of PGHOST, PGPORT, PGUSER, PGPASSWORD,
PGDATABASE and the other variables that psql reads. Connect directly, or through a pooler in session
mode; locks are kept by a connection for as long as they are held.";

const MORE: &str = "\
Keys:
  42              a number, as in PostgreSQL's own functions for advisory locks
  1,2 or 1/2      a pair of numbers
  nightly-report  a name, whose hash is the number
  name:42         a name, whatever it looks like
Keys belong to a database: the same key in two databases is two locks.

The database:
  It is that of --url, or DATABASE_URL, or else of PGHOST, PGPORT, PGUSER, PGPASSWORD, PGDATABASE
  and the other variables that psql reads. Connect directly, or through a pooler in session mode;
  locks are kept by a connection for as long as they are held.

Exit codes, beside those of the command that was run:
    0  all is well
    1  the lock was not got (-n, -w), another with -E; it is free (who); not ended (kill)
    2  the command line is wrong
   69  the database can't be reached, or failed
   71  the operating system refuses something
   77  the role must not do that (kill)
   78  a lock would mean nothing there: a standby, a pooler in transaction mode, wrong settings
  125  the lock was lost while the command ran
  126  the command can't be run
  127  the command was not found
  128  and more: the number of the signal that ended the command, or the wait";
