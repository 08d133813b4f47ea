//! Makes the server call other functions than its own: overloads in another schema, or replacements.

use sqlx::{AssertSqlSafe, PgConnection};

/// The message that a function or operator of a [hostile schema](hostile_schema) raises, and that the server logs.
pub const HIJACKED: &str = "hijacked";

/// Makes a schema with exact overloads of the functions and operators of `pg_catalog`, each of which
/// raises [`HIJACKED`], and with relations and types of the same names.
///
/// PostgreSQL prefers an exact overload from any schema of the search path, also one that stands behind
/// `pg_catalog`, to one in `pg_catalog` that needs a cast.
pub async fn hostile_schema(conn: &mut PgConnection, schema: &str) {
    let statement = format!(
        r#"
        CREATE SCHEMA {schema};
        GRANT USAGE ON SCHEMA {schema} TO PUBLIC;
        DO $do$
        DECLARE
            raises text := $f$LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION '{HIJACKED}'; END $$ $f$;
            types text[] := '{{boolean,smallint,integer,bigint,numeric,"double precision",oid,name,text,
                varchar,xid,jsonb,interval,"timestamp with time zone",inet}}';
            operators text[] := '{{=,<>,<,>,<=,>=,+,-,*,/,%,&,|,<<,>>,||,~,->,->>}}';
            it record;
            one text;
            two text;
            operator text;
        BEGIN
            FOR it IN
                SELECT p.proname, pg_get_function_identity_arguments(p.oid) AS arguments,
                    p.proretset, format_type(p.prorettype, NULL) AS result
                FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang
                WHERE p.pronamespace = 'pg_catalog'::regnamespace AND p.prokind IN ('f', 'a')
                    AND NOT 'internal'::regtype = ANY (p.proargtypes)
                    AND NOT 'cstring'::regtype = ANY (p.proargtypes)
                    AND (p.proname LIKE 'pg\_%' OR p.proname IN ('set_config', 'current_setting',
                        'current_database', 'unnest', 'string_agg', 'count', 'host', 'to_jsonb',
                        'clock_timestamp', 'statement_timestamp', 'now', 'inet_client_addr',
                        'has_function_privilege', 'has_language_privilege', 'make_interval',
                        'date_part', 'extract', 'length', 'substr', 'replace', 'txid_current',
                        'int4', 'int8', 'text', 'bool', 'oid', 'float8', 'numeric'))
            LOOP
                BEGIN
                    EXECUTE format('CREATE FUNCTION {schema}.%I(%s) RETURNS %s %s %s', it.proname,
                        it.arguments, CASE WHEN it.proretset THEN 'SETOF' ELSE '' END, it.result, raises);
                EXCEPTION WHEN OTHERS THEN NULL;
                END;
            END LOOP;
            FOREACH one IN ARRAY types LOOP
                FOREACH two IN ARRAY types LOOP
                    EXECUTE format('CREATE FUNCTION {schema}.operate(%s, %s) RETURNS boolean %s',
                        one, two, raises);
                    FOREACH operator IN ARRAY operators LOOP
                        EXECUTE format('CREATE OPERATOR {schema}.%s
                            (LEFTARG = %s, RIGHTARG = %s, FUNCTION = {schema}.operate)',
                            operator, one, two);
                    END LOOP;
                END LOOP;
            END LOOP;
            FOR it IN
                SELECT relname FROM pg_class WHERE relnamespace = 'pg_catalog'::regnamespace
                    AND relkind IN ('r', 'v')
            LOOP
                EXECUTE format('CREATE VIEW {schema}.%I AS SELECT 1 AS {HIJACKED}', it.relname);
                EXECUTE format('GRANT SELECT ON {schema}.%I TO PUBLIC', it.relname);
            END LOOP;
            FOREACH one IN ARRAY '{{bool,int2,int4,int8,float8,oid,name,text,timestamptz,regclass}}'::text[]
            LOOP
                EXECUTE format('CREATE TYPE {schema}.%I AS ENUM ()', one);
            END LOOP;
        END $do$"#
    );
    let made = sqlx::raw_sql(AssertSqlSafe(statement)).execute(conn).await;
    made.expect("a superuser can make a schema");
}

/// Replaces a function of `pg_catalog`, such as `pg_advisory_unlock(bigint)`, in this database.
///
/// `body` is PL/pgSQL, with the arguments as `$1`, `$2`, …. The original is in the schema `original`.
pub async fn replace_function(conn: &mut PgConnection, function: &str, body: &str) {
    let (name, _) = function.split_once('(').expect("a function has its arguments");
    let statement = format!(
        "SELECT set_config('allow_system_table_mods', 'on', false)
        WHERE NOT current_setting('allow_system_table_mods')::bool;
        CREATE SCHEMA IF NOT EXISTS original;
        GRANT USAGE ON SCHEMA original TO PUBLIC;
        DO $do$
        DECLARE
            function regprocedure := 'pg_catalog.{function}';
            arguments text := pg_get_function_arguments(function);
            result text := pg_get_function_result(function);
        BEGIN
            -- Moved, because the server calls the original by its number, whatever its definition says.
            ALTER FUNCTION pg_catalog.{function} SET SCHEMA original;
            EXECUTE format('CREATE FUNCTION pg_catalog.{name}(%s) RETURNS %s LANGUAGE plpgsql AS %L',
                arguments, result, $body${body}$body$);
        END $do$"
    );
    let replaced = sqlx::raw_sql(AssertSqlSafe(statement)).execute(conn).await;
    replaced.expect("a superuser can replace a function");
}
