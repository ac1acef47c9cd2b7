//! A download that is killed goes on where it was.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Answers each request, whose lines it is given, with `answer`. Ends with the test's process.
pub(crate) fn serve(answer: impl Fn(&[String], &mut TcpStream) + Send + Sync + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let answer = Arc::new(answer);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, answer) = (stream.unwrap(), Arc::clone(&answer));
            std::thread::spawn(move || {
                let lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(|line| line.ok());
                let lines: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
                answer(&lines, &mut stream);
            });
        }
    });
    endpoint
}

#[test]
fn a_killed_download_goes_on_where_it_was() {
    let text = "the quick brown fox jumps over the lazy dog. ".repeat(2000);
    let (size, half) = (text.len(), text.len() / 2);
    let ranges = Arc::new(Mutex::new(Vec::new()));
    let (log, body) = (Arc::clone(&ranges), text.clone());
    let endpoint = serve(move |lines, stream| {
        let range = lines.iter().find_map(|line| line.to_lowercase().strip_prefix("range: bytes=").map(str::to_owned));
        let from: usize = range.as_ref().map_or(0, |range| range.trim_end_matches('-').parse().unwrap());
        let status = if from > 0 {
            format!("206 Partial Content\r\nContent-Range: bytes {from}-{}/{size}", size - 1)
        } else {
            "200 OK".to_owned()
        };
        let about = format!("X-Repo-Commit: c0ffee\r\nETag: \"v1\"\r\nContent-Length: {}", size - from);
        let _ = stream.write_all(format!("HTTP/1.1 {status}\r\n{about}\r\nConnection: close\r\n\r\n").as_bytes());
        if lines[0].starts_with("GET") {
            log.lock().unwrap().push(from);
            if from > 0 {
                let _ = stream.write_all(&body.as_bytes()[from..]);
            } else {
                let _ = stream.write_all(&body.as_bytes()[..half]);
                std::thread::sleep(Duration::from_secs(60));
            }
        }
    });
    let dir = tempfile::tempdir().unwrap();
    let dataset = "name = \"d\"\n[source]\nkind = \"hub\"\nrepo = \"a/b\"\nfiles = [\"c.txt\"]\nformat = \"text\"\n";
    std::fs::write(dir.path().join("d.toml"), dataset).unwrap();
    let prepare = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lowkey"));
        command.args(["data", "prepare", "d.toml", "--out", "new"]).current_dir(dir.path());
        command.env("HF_ENDPOINT", &endpoint).env("HF_HOME", "cache").stdout(Stdio::null()).stderr(Stdio::null());
        command
    };
    let mut killed = prepare().spawn().unwrap();
    let partial = dir.path().join("cache/hub/datasets--a--b/blobs/v1.incomplete");
    let started = Instant::now();
    while !partial.metadata().is_ok_and(|found| found.len() == half as u64) {
        assert!(started.elapsed() < Duration::from_secs(60), "nothing arrives");
        std::thread::sleep(Duration::from_millis(10));
    }
    killed.kill().unwrap();
    killed.wait().unwrap();
    assert!(prepare().status().unwrap().success());
    assert_eq!(*ranges.lock().unwrap(), [0, half]);
    let fetched = dir.path().join("cache/hub/datasets--a--b/snapshots/c0ffee/c.txt");
    assert_eq!(std::fs::read_to_string(fetched).unwrap(), text);
    assert!(!partial.exists());
}
