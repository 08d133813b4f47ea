//! The command line as a whole.

use clap::{ArgAction, Parser, Subcommand};

use crate::become_command::BecomeArgs;
use crate::completions::{CompletionsArgs, ManArgs};
use crate::database::DatabaseArgs;
use crate::doctor::DoctorArgs;
use crate::elect::ElectArgs;
use crate::guardian::GuardianArgs;
use crate::key::KeyArgs;
use crate::kill::KillArgs;
use crate::ls::LsArgs;
use crate::run::RunArgs;
use crate::who::WhoArgs;

/// Locks for a shell, shared by all machines that can reach one PostgreSQL database
#[derive(Debug, Parser)]
#[command(version, propagate_version = true, after_help = SHORT, after_long_help = long_help())]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) database: DatabaseArgs,

    /// Print on standard error what the program does; twice, what the library does too
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub(crate) verbose: u8,

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
    #[command(hide = true)]
    Guardian(GuardianArgs),
}

const SHORT: &str = "\
Examples:
  pglock run nightly-report -- ./report.sh    one machine at a time
  pglock who nightly-report                   which session holds the lock
  pglock ls                                   all locks of the database, and their waiters

The database is that of --url, DATABASE_URL, or the variables that psql reads
(PGHOST, PGSERVICE, …). pglock --help lists them, the forms of a key, and the
exit codes.";

/// Describes, for `--help`, what [`crate::database`] does with each parameter of libpq.
pub(crate) const PARAMETERS_HELP: &str = "\
  honoured, in a URL, in a service file, or as a variable:
    host PGHOST, hostaddr PGHOSTADDR, port PGPORT, dbname PGDATABASE, user
    PGUSER, password PGPASSWORD, passfile PGPASSFILE (and ~/.pgpass), service
    PGSERVICE, servicefile PGSERVICEFILE (and PGSYSCONFDIR), connect_timeout
    PGCONNECT_TIMEOUT (0: no limit), options PGOPTIONS, application_name
    PGAPPNAME, fallback_application_name, target_session_attrs
    PGTARGETSESSIONATTRS (any, primary, read-write, prefer-standby), sslmode
    PGSSLMODE (all but allow), requiressl PGREQUIRESSL, sslrootcert
    PGSSLROOTCERT, sslcert PGSSLCERT, sslkey PGSSLKEY, ssl-mode, ssl-ca,
    ssl-root-cert, ssl-cert, ssl-key (of sqlx)
  refused, unless the value is what pglock does anyway:
    channel_binding PGCHANNELBINDING, client_encoding PGCLIENTENCODING,
    gssdelegation PGGSSDELEGATION, gssencmode PGGSSENCMODE, load_balance_hosts
    PGLOADBALANCEHOSTS, max_protocol_version PGMAXPROTOCOLVERSION,
    min_protocol_version PGMINPROTOCOLVERSION, oauth_client_id,
    oauth_client_secret, oauth_issuer, oauth_scope, replication, require_auth
    PGREQUIREAUTH, requirepeer PGREQUIREPEER, scram_client_key,
    scram_server_key, sslcertmode PGSSLCERTMODE, sslcrl PGSSLCRL, sslcrldir
    PGSSLCRLDIR, sslkeylogfile, ssl_max_protocol_version
    PGSSLMAXPROTOCOLVERSION, ssl_min_protocol_version PGSSLMINPROTOCOLVERSION,
    sslnegotiation PGSSLNEGOTIATION, sslpassword, sslsni PGSSLSNI
  accepted without effect, because the heartbeat detects a dead server, or the
  feature is not used:
    keepalives, keepalives_count, keepalives_idle, keepalives_interval,
    tcp_user_timeout, datestyle PGDATESTYLE, geqo PGGEQO, timezone PGTZ, gsslib
    PGGSSLIB, krbsrvname PGKRBSRVNAME, sslcompression PGSSLCOMPRESSION,
    statement-cache-capacity
  Lists of hosts, abstract sockets and unknown parameters are refused.
  sslmode=verify-full uses the certificates of the system unless sslrootcert
  or ~/.postgresql/root.crt names others.";

const KEYS_AND_CODES: &str = "\
Keys:
  42              a number, as in PostgreSQL's own functions for advisory
                  locks
  1,2 or 1/2      a pair of numbers
  nightly-report  a name, whose hash is the number
  name:42         a name, whatever it looks like
A number that is too large is refused, and so is an empty key. Keys belong to
a database: the same key in two databases is two locks.

Exit codes, beside those of the command that is run:
    0  success
    1  the lock was not acquired (-n, -w), another code with -E; it is free
       (who); not ended (kill)
    2  the command line or the environment is wrong
   69  the database can't be reached, or failed
   71  the operating system refused something
   77  the role is not allowed to do that (kill)
   78  a lock would exclude nothing there: a standby, a pooler in transaction
       mode, wrong settings
  125  the lock was lost while the command ran; nothing of the command runs
       any more
  126  the command can't be run
  127  the command was not found
  128  and more: the number of the signal that ended the command, or the wait";

fn long_help() -> String {
    format!(
        "{KEYS_AND_CODES}\n\n\
         The database is that of --url, else of DATABASE_URL, completed by the service\n\
         file and by the variables that psql reads. Connect directly, or through a\n\
         pooler in session mode. Parameters:\n\
         {PARAMETERS_HELP}"
    )
}
