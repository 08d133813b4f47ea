// Serves a PGlite on a unix socket.
import { writeFileSync } from "node:fs";
import { PGlite } from "@electric-sql/pglite";
import { PGLiteSocketServer } from "@electric-sql/pglite-socket";

const [path, pidFile, clients] = process.argv.slice(2);
const db = await PGlite.create();
const server = new PGLiteSocketServer({ db, path, maxConnections: Number(clients) });
await server.start();
writeFileSync(pidFile, `${process.pid}\n`);
