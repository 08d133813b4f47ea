-- A schema whose owner wants the statements of other users to call its functions. Each function raises
-- an exception that names it. The overloads have other argument types too than PostgreSQL's own,
-- because an exact match is preferred in any schema of the search path (CVE-2018-1058).
CREATE SCHEMA hostile;
GRANT USAGE ON SCHEMA hostile TO PUBLIC;

CREATE FUNCTION hostile.deny(what pg_catalog.anyelement) RETURNS boolean LANGUAGE plpgsql AS
$$ BEGIN RAISE EXCEPTION 'used a type of the schema hostile'; END $$;

DO $do$
DECLARE
    made record;
    names text[] := '{array_agg, array_length, array_position, array_to_string, array_upper, btrim,
        cardinality, clock_timestamp, concat, concat_ws, convert_from, convert_to,
        current_database, current_setting, date_part, decode, format, generate_series, generate_subscripts, greatest, hashtext,
        has_function_privilege, has_language_privilege, int4, int8, jsonb_build_object, left, length,
        lower, ltrim, max, md5, min, mod, now, octet_length, oid, pg_advisory_lock,
        pg_advisory_lock_shared, pg_advisory_unlock, pg_advisory_unlock_all,
        pg_advisory_unlock_shared, pg_advisory_xact_lock, pg_advisory_xact_lock_shared,
        pg_backend_pid, pg_blocking_pids, pg_cancel_backend, pg_current_xact_id,
        pg_current_xact_id_if_assigned, pg_get_userbyid, pg_has_role, pg_is_in_recovery,
        pg_listening_channels, pg_lock_status, pg_logical_emit_message, pg_my_temp_schema, pg_notify,
        pg_postmaster_start_time, pg_sleep, pg_stat_clear_snapshot, pg_stat_get_activity,
        pg_stat_get_backend_start, pg_terminate_backend, pg_try_advisory_lock,
        pg_try_advisory_lock_shared, pg_try_advisory_xact_lock, pg_try_advisory_xact_lock_shared,
        pg_typeof, position, quote_ident, quote_literal, replace, right, row_number, rpad, set_config,
        split_part, statement_timestamp, string_agg, string_to_array, strpos, substr, substring, sum,
        text, timestamptz, to_char, to_jsonb, to_timestamp, transaction_timestamp, trunc,
        txid_current, txid_current_if_assigned, unnest, upper, version, bool_and, bool_or,
        make_interval, pg_control_system, inet_server_addr, inet_server_port, pg_conf_load_time,
        host, bit_and, bit_or, any_value, every, abs, round, floor, ceil, timezone, mxid_age, age,
        pg_snapshot_xmin, pg_current_snapshot, txid_current_snapshot, txid_snapshot_xmin}';
BEGIN
    FOR made IN
        WITH RECURSIVE alternatives (type, other) AS (
            VALUES ('int8', 'int8'), ('int8', 'int4'), ('int8', 'int2'), ('int8', 'oid'),
                ('int4', 'int4'), ('int4', 'int2'), ('int4', 'int8'),
                ('text', 'text'), ('text', 'varchar'), ('text', 'name'),
                ('oid', 'oid'), ('oid', 'int4'), ('oid', 'int8'),
                ('anyarray', 'int8[]'), ('anyarray', 'int4[]'), ('anyarray', 'int2[]'),
                ('anyarray', 'text[]'), ('anyarray', 'bool[]'), ('anyarray', 'oid[]'),
                ('anynonarray', 'int8'), ('anynonarray', 'int4'), ('anynonarray', 'text'),
                ('anynonarray', 'bool'), ('anynonarray', 'timestamptz'),
                ('anyelement', 'int8'), ('anyelement', 'int4'), ('anyelement', 'text'),
                ('anyelement', 'bool'), ('anyelement', 'oid'),
                ('"any"', 'int8'), ('"any"', 'int4'), ('"any"', 'text'), ('"any"', 'bool')
        ), types (type, other) AS (
            SELECT coalesce(type::regtype::oid, 0), other::regtype::oid FROM alternatives
        ), signatures (name, types, done) AS (
            SELECT proname, proargtypes::oid[], '{}'::oid[]
            FROM pg_proc
            WHERE pronamespace = 'pg_catalog'::regnamespace AND proname = ANY (names)
                AND pronargs <= 4
          UNION ALL
            SELECT name, signatures.types,
                done || coalesce(types.other, signatures.types[cardinality(done)])
            FROM signatures
                LEFT JOIN types ON types.type = signatures.types[cardinality(done)]
            WHERE cardinality(done) < cardinality(signatures.types)
        )
        SELECT DISTINCT name, array(
            SELECT format_type(type, NULL) FROM unnest(done) WITH ORDINALITY AS t (type, n) ORDER BY n
        ) AS arguments
        FROM signatures
        WHERE cardinality(done) = cardinality(types) AND NOT EXISTS (
            SELECT FROM pg_type WHERE pg_type.oid = ANY (done) AND typtype = 'p'
        )
    LOOP
        EXECUTE format(
            'CREATE FUNCTION hostile.%I(%s) RETURNS text LANGUAGE plpgsql AS %L',
            made.name, array_to_string(made.arguments, ', '),
            format('BEGIN RAISE EXCEPTION %L; END', 'called hostile.' || made.name || '('
                || array_to_string(made.arguments, ', ') || ')')
        );
    END LOOP;

    -- Operators for each pair of types, those included that PostgreSQL has only by a cast.
    FOR made IN
        SELECT l, r FROM
            unnest('{text, varchar, name, int8, int4, int2, oid, bool, timestamptz, interval, xid,
                     float8, numeric, jsonb}'::text[]) AS l,
            unnest('{text, varchar, name, int8, int4, int2, oid, bool, timestamptz, interval, xid,
                     float8, numeric, jsonb}'::text[]) AS r
      UNION ALL
        SELECT t, t FROM unnest('{int8[], int4[], int2[], text[], oid[]}'::text[]) AS t
    LOOP
        EXECUTE format(
            'CREATE FUNCTION hostile.operate(%s, %s) RETURNS pg_catalog.bool LANGUAGE plpgsql AS %L',
            made.l, made.r,
            format('BEGIN RAISE EXCEPTION %L; END',
                'used an operator of hostile on ' || made.l || ' and ' || made.r)
        );
    END LOOP;
    FOR made IN
        SELECT oprname, format_type(proargtypes[0], NULL) AS l, format_type(proargtypes[1], NULL) AS r
        FROM pg_proc, unnest('{=, <>, <, >, <=, >=, +, -, *, /, %, &, |, #, <<, >>, ||, &&, @>, <@,
                              ~, ~~, ->, ->>}'::text[]) AS oprname
        WHERE pronamespace = 'hostile'::regnamespace AND proname = 'operate'
    LOOP
        EXECUTE format(
            'CREATE OPERATOR hostile.%s (FUNCTION = hostile.operate, LEFTARG = %s, RIGHTARG = %s)',
            made.oprname, made.l, made.r
        );
    END LOOP;

    -- What is named without its schema: types, and the views of the catalog.
    FOR made IN
        SELECT t AS type FROM unnest('{text, name, int8, int4, int2, oid, bool, timestamptz, xid,
            xid8, regclass, regtype, regprocedure, jsonb}'::text[]) AS t
        WHERE to_regtype('pg_catalog.' || t) IS NOT NULL
    LOOP
        EXECUTE format(
            'CREATE DOMAIN hostile.%I AS pg_catalog.%I CHECK (hostile.deny(VALUE))',
            made.type, made.type
        );
    END LOOP;
    FOR made IN
        SELECT v AS view FROM unnest('{pg_locks, pg_stat_activity, pg_settings, pg_database,
            pg_roles, pg_class, pg_proc, pg_namespace, pg_language, pg_auth_members,
            pg_stat_replication, pg_extension}'::text[]) AS v
    LOOP
        EXECUTE format('CREATE TABLE hostile.%I (of_the_schema_hostile int)', made.view);
        EXECUTE format('GRANT SELECT ON hostile.%I TO PUBLIC', made.view);
    END LOOP;
END $do$;
