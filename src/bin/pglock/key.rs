//! `pglock key`: shows the numbers that various programs lock for a name.

use clap::Args;

use crate::exit::{Exit, Failure, print};
use crate::show;
use crate::table;

/// Show the numbers that a name is locked by, and where PostgreSQL shows them
///
/// Different programs make different numbers of the same name. CLASSID, OBJID and OBJSUBID are how
/// PostgreSQL shows them in its view of locks. A name may be written name:NAME, as in other commands. No database is
/// needed.
#[derive(Args, Debug)]
pub(crate) struct KeyArgs {
    /// The name; for Rails, that of the database
    name: String,
}

pub(crate) fn run(args: &KeyArgs) -> Result<Exit, Failure> {
    let name = args.name.strip_prefix("name:").unwrap_or(&args.name);
    let rows = show::schemes(name).map(|(scheme, key)| {
        let [classid, objid, objsubid] = show::place(&key).unwrap_or_default();
        let numbers = [classid, objid, objsubid].map(|number| number.to_string());
        let [classid, objid, objsubid] = numbers;
        [scheme.to_owned(), show::written(&key), classid, objid, objsubid]
    });
    let headline = ["SCHEME", "KEY", "CLASSID", "OBJID", "OBJSUBID"];
    print(table::lay_out(headline, &rows, table::width()).as_bytes())?;
    Ok(Exit::FINE)
}
