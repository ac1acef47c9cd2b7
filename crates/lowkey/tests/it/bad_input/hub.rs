//! A hub that lies, stalls or is in trouble, and settings that lead to none.

use std::io::Write;
use std::net::TcpStream;

use super::{Case, case};

const DATASET: &str =
    "name = \"d\"\n[source]\nkind = \"hub\"\nrepo = \"owner/stories\"\nfiles = [\"a.txt\"]\nformat = \"text\"\n";

/// Answers with `answer`, which is told whether the file itself is asked for.
fn serve(answer: impl Fn(bool, &mut TcpStream) + Send + Sync + 'static) -> String {
    crate::hub::serve(move |lines, stream| answer(lines.first().is_some_and(|line| line.starts_with("GET")), stream))
}

/// `lowkey data prepare` of a file that lies on this hub.
fn hub(name: &str, endpoint: impl Into<String>, fragments: &[&str]) -> Case {
    case(format!("hub: {name}"), &["data", "prepare", "d.toml", "--out", "new"])
        .file("d.toml", DATASET)
        .variable("HF_ENDPOINT", endpoint)
        .variable("HF_HOME", "hub-cache")
        .variable("HF_HUB_ETAG_TIMEOUT", "1")
        .variable("HF_HUB_DOWNLOAD_TIMEOUT", "1")
        .says(&["owner/stories", "a.txt"])
        .says(fragments)
}

/// A hub that gives this answer to all.
fn says(name: &str, answer: &'static [u8], fragments: &[&str]) -> Case {
    hub(name, serve(move |_, stream| drop(stream.write_all(answer))), fragments)
}

/// A hub that describes a file of five bytes, and gives this answer to whoever asks for it.
fn sends(name: &str, answer: &'static [u8], fragments: &[&str]) -> Case {
    let describes = b"HTTP/1.1 200 OK\r\nX-Repo-Commit: c0ffee\r\nETag: \"b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0\"\r\nContent-Length: 5\r\nConnection: close\r\n\r\n";
    let answer = move |get: bool, stream: &mut TcpStream| {
        let _ = if get { stream.write_all(answer) } else { stream.write_all(describes) };
    };
    hub(name, serve(answer), fragments)
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = vec![
        says("no HTTP", b"SSH-2.0-OpenSSH_9.6\r\n", &["does HF_ENDPOINT name a hub?"]),
        says("a login page", b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>", &["does HF_ENDPOINT name a hub?"]),
        says("nothing", b"", &["check the network"]),
        says("300", b"HTTP/1.1 300 Choices\r\nContent-Length: 0\r\n\r\n", &["answered 300 and leads nowhere"]),
        says("302", b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n", &["answered 302 and leads nowhere"]),
        says("304", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 0\r\n\r\n", &["answered 304 and leads nowhere"]),
        says("itself", b"HTTP/1.1 302 Found\r\nLocation: a.txt\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", &["redirects more than 10 times"]),
        says("another scheme", b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n", &["redirects to", "no address"]),
        says("401", b"HTTP/1.1 401 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", &["access refused (401)", "HF_TOKEN"]),
        says("403", b"HTTP/1.1 403 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", &["access refused (403)", "HF_TOKEN"]),
        says("404", b"HTTP/1.1 404 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", &["not found (404)"]),
        says("416", b"HTTP/1.1 416 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", &["answered 416"]),
        says("429", b"HTTP/1.1 429 No\r\nRetry-After: 0\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", &["answered 429", "try again later"]),
        says("500", b"HTTP/1.1 500 No\r\nRetry-After: 0\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", &["answered 500"]),
        says("503", b"HTTP/1.1 503 No\r\nRetry-After: 0\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", &["answered 503"]),
        says("a path for a hash", b"HTTP/1.1 200 OK\r\nX-Repo-Commit: c0ffee\r\nETag: \"../../../../text.txt\"\r\nContent-Length: 5\r\nConnection: close\r\n\r\n", &["ETag", "cannot name a file"]),
        says("a path for a commit", b"HTTP/1.1 200 OK\r\nX-Repo-Commit: ../../../..\r\nETag: \"abc\"\r\nContent-Length: 5\r\nConnection: close\r\n\r\n", &["X-Repo-Commit", "cannot name a file"]),
        says("a path for a linked hash", b"HTTP/1.1 200 OK\r\nX-Repo-Commit: c0\r\nX-Linked-Etag: \"/etc/x\"\r\nContent-Length: 5\r\nConnection: close\r\n\r\n", &["cannot name a file"]),
        says("no hash", b"HTTP/1.1 200 OK\r\nX-Repo-Commit: c0ffee\r\nContent-Length: 5\r\nConnection: close\r\n\r\n", &["it has no ETag"]),
        says("no commit", b"HTTP/1.1 200 OK\r\nETag: \"abc\"\r\nContent-Length: 5\r\nConnection: close\r\n\r\n", &["it has no X-Repo-Commit"]),
        says("control characters", b"HTTP/1.1 302 Found\r\nLocation: \x80\x81 \xc2\x9b2J\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", &["redirects to"]),
        sends("other bytes", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nworld", &["what arrived is not the file", "git hash"]),
        sends("fewer bytes", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhel", &["after 3 of 5 bytes"]),
        sends("more bytes", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\nConnection: close\r\n\r\nhello you", &["sends 9 bytes of a file that has 5"]),
        sends("another encoding", b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello", &["encoding", "gzip"]),
        sends("no chunks", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\nhello", &["after 0 of 5 bytes"]),
        hub("a body without end", serve(|get, stream| {
            let head: &[u8] = b"HTTP/1.1 200 OK\r\nX-Repo-Commit: c0ffee\r\nETag: \"abc\"\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n";
            let _ = stream.write_all(if get { head } else { b"HTTP/1.1 200 OK\r\nX-Repo-Commit: c0ffee\r\nETag: \"abc\"\r\nX-Linked-Size: 100000\r\nConnection: close\r\n\r\n" });
            while get && stream.write_all(format!("1000\r\n{}\r\n", "x".repeat(4096)).as_bytes()).is_ok() {}
        }), &["sends more than the 100000 bytes"]),
        hub("a file that no disk holds", serve(|_, stream| {
            drop(stream.write_all(b"HTTP/1.1 200 OK\r\nX-Repo-Commit: c0ffee\r\nETag: \"abc\"\r\nContent-Length: 999999999999999999\r\nConnection: close\r\n\r\n"));
        }), &["the disk takes"]),
        hub("headers without end", serve(|_, stream| {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n");
            while stream.write_all("X-Long: header\r\n".repeat(1000).as_bytes()).is_ok() {}
        }), &["does HF_ENDPOINT name a hub?"]),
        hub("no answer", serve(|_, _| std::thread::sleep(std::time::Duration::from_secs(30))), &["within 1s", "check the network"]),
        hub("no address", "http://", &["HF_ENDPOINT"]),
        hub("another protocol", "ftp://hub", &["HF_ENDPOINT must start with http:// or https://"]),
        hub("a password", "http://me:secret@127.0.0.1:1", &["HF_TOKEN instead"]),
        hub("offline", "http://127.0.0.1:1", &["HF_HUB_OFFLINE", "hub-cache"]).variable("HF_HUB_OFFLINE", "1"),
        hub("a token that is none", "http://127.0.0.1:1", &["HF_TOKEN holds characters"]).variable("HF_TOKEN", "a\u{7}b"),
        hub("a file for a cache", serve(|_, stream| {
            drop(stream.write_all(b"HTTP/1.1 200 OK\r\nX-Repo-Commit: c0ffee\r\nETag: \"abc\"\r\nContent-Length: 5\r\nConnection: close\r\n\r\n"));
        }), &["text.txt"]).variable("HF_HUB_CACHE", "text.txt"),
    ];
    // Names that lead out of the cache, in the dataset file.
    for (key, value) in [
        ("revision", "\"../../../../text\""),
        ("revision", "\"/etc/x\""),
        ("revision", "\"\""),
        ("revision", "\"a//b\""),
        ("revision", "\"a\\\\b\""),
        ("repo", "\"../..\""),
        ("repo", "\"a/b/c\""),
        ("repo", "\"/etc\""),
        ("repo", "\"a--b\""),
        ("files", "[\"../a.txt\"]"),
        ("files", "[\"/etc/passwd\"]"),
        ("files", "[\"a\\\\..\\\\b\"]"),
    ] {
        let lines = DATASET.lines().filter(|line| !line.starts_with(key)).map(|line| format!("{line}\n"));
        let text: String = lines.chain([format!("{key} = {value}\n")]).collect();
        let named = format!("source.{key}");
        let case = case(format!("hub: {key} = {value}"), &["data", "prepare", "d.toml", "--out", "new"]);
        cases.push(case.file("d.toml", text).code(2).says(&["d.toml", &named]));
    }
    cases
}
