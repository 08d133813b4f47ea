// A process in which many goroutines acquire and release one lock, on Go's database/sql and lib/pq, by the statements
// that go-pglock sends. Another goroutine measures a query on the same pool.
//
// The arguments are the connection string, the key, and the numbers of goroutines, connections and milliseconds. The output is a line
// with the number of cycles, and a line with the microseconds of each query.
package main

import (
	"context"
	"database/sql"
	"fmt"
	"log"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	_ "github.com/lib/pq"
)

func main() {
	if len(os.Args) != 6 {
		log.Fatal("usage: main CONNECTION KEY GOROUTINES CONNECTIONS MILLISECONDS")
	}
	var numbers [4]int
	for i := range numbers {
		number, err := strconv.Atoi(os.Args[i+2])
		check(err)
		numbers[i] = number
	}
	key, goroutines, connections, millis := numbers[0], numbers[1], numbers[2], numbers[3]
	db, err := sql.Open("postgres", os.Args[1])
	check(err)
	db.SetMaxOpenConns(connections)
	db.SetMaxIdleConns(connections)
	check(db.Ping())

	end := time.Now().Add(time.Duration(millis) * time.Millisecond)
	var queries []string
	var running sync.WaitGroup
	cycles := make([]int, goroutines)
	running.Add(goroutines + 1)
	go func() {
		defer running.Done()
		for time.Now().Before(end) {
			asked := time.Now()
			_, err := db.Exec("SELECT 1")
			check(err)
			queries = append(queries, strconv.FormatInt(time.Since(asked).Microseconds(), 10))
			time.Sleep(5 * time.Millisecond)
		}
	}()
	for i := range cycles {
		go func(cycles *int) {
			defer running.Done()
			for time.Now().Before(end) {
				check(cycle(db, key))
				*cycles++
			}
		}(&cycles[i])
	}
	running.Wait()
	all := 0
	for _, count := range cycles {
		all += count
	}
	fmt.Println(all)
	fmt.Println(strings.Join(queries, " "))
}

// cycle locks on a connection of its own from the pool, and returns the connection.
func cycle(db *sql.DB, key int) error {
	ctx := context.Background()
	connection, err := db.Conn(ctx)
	if err != nil {
		return err
	}
	defer connection.Close()
	if _, err := connection.ExecContext(ctx, "SELECT pg_advisory_lock($1)", key); err != nil {
		return err
	}
	_, err = connection.ExecContext(ctx, "SELECT pg_advisory_unlock($1)", key)
	return err
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
