# Makes a directory for a server, and says "made". Waits until the owner of the server is gone, then takes the server
# down and the directory away.
# Standard input is a pipe that the owner holds open. It says "starting" before a server is
# started, and "started" after.

dir=$1
pid_file=$dir/$2
signal=$3
# The owner may be gone before it hears of the directory.
trap '' HUP INT PIPE TERM
mkdir -m 700 "$dir" 2>&1 || exit 1
echo made
exec >/dev/null

state=
while read -r line; do state=$line; done

pause() { sleep 0.02 2>/dev/null || sleep 1; }

# The server's pid, if it still is one: a pid in a stale file may be anybody's by now.
server() {
    pid=
    # pgpool-II writes no end of the line.
    read -r pid 2>/dev/null <"$pid_file" || [ -n "$pid" ] || return 1
    if [ -d /proc/self ]; then
        command=$(tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline")
    else
        command=$(ps -o command= -p "$pid" 2>/dev/null)
    fi
    case $command in *"$dir/"*) ;; *) return 1 ;; esac
}

children() {
    if [ -d /proc/self ]; then
        for stat in /proc/[0-9]*/stat; do
            read -r child name status parent rest 2>/dev/null <"$stat" || continue
            [ "$parent" = "$1" ] && echo "$child"
        done
    else
        ps -A -o pid=,ppid= | while read -r child parent; do
            [ "$parent" = "$1" ] && echo "$child"
        done
    fi
}

# A server about to start has no pid file yet.
tries=0
while [ "$state" = starting ] && ! server && [ $tries -lt 100 ]; do
    tries=$((tries + 1))
    pause
done 2>/dev/null

if server; then
    main=$pid
    backends=$(children "$main")
    kill "-$signal" "$main"
    # Whoever was paused must wake up to hear of it.
    kill -CONT "$main" $backends
    tries=0
    while [ $tries -lt 300 ] && server; do
        tries=$((tries + 1))
        pause
    done
    if server; then
        kill -STOP "$main"
        kill -KILL $(children "$main") "$main"
    fi
fi 2>/dev/null

# What a killed PostgreSQL could not give back itself: line 7 ends with its shared memory's id.
line=0
while read -r _ id; do
    line=$((line + 1))
    [ $line = 7 ] && ipcrm -m "$id"
done 2>/dev/null <"$pid_file"

# Again, in case something was still writing.
tries=0
while [ -e "$dir" ] && [ $tries -lt 100 ]; do
    rm -rf "$dir" 2>/dev/null && break
    tries=$((tries + 1))
    pause
done
