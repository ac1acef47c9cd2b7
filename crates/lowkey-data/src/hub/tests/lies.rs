//! Servers that lie, stall, or are in trouble: each costs an error that says so, and nothing else.

use std::io::Write;
use std::net::TcpStream;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::server::{Request, Server, git, head, reply, send};
use super::{TEXT, URL, blobs, fetch, hub, refused, serve};

/// What every honest answer about the file says.
fn honest() -> [(&'static str, String); 2] {
    [("ETag", format!("\"{}\"", git(TEXT))), ("X-Repo-Commit", "c0ffee".to_owned())]
}

/// A hub that is honest when asked about the file, and answers with `lie` when asked for it.
fn lying(lie: impl Fn(&Request, &mut TcpStream) + Send + Sync + 'static) -> Server {
    Server::start(
        move |request, stream| if request.is_head() { send(request, stream, TEXT) } else { lie(request, stream) },
    )
}

/// What a server does with a connection, whatever it is asked.
type Lie = Box<dyn Fn(&mut TcpStream) + Send + Sync>;

/// Everything below a folder.
fn entries(dir: &Path) -> usize {
    dir.read_dir().map_or(0, |entries| entries.count())
}

#[test]
fn a_hub_that_names_a_path_is_refused_before_anything_is_created() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("victim")).unwrap();
    std::fs::write(dir.path().join("victim/rc"), "mine").unwrap();
    let absolute = dir.path().join("victim/rc").to_str().unwrap().to_owned();
    for name in ["../../../victim/rc", "..", ".", "a/b", "a\\b", "", "x y", "caf\u{e9}", "W/\"../x\"", &absolute] {
        for lie in ["ETag", "X-Linked-Etag", "X-Repo-Commit"] {
            let (cache, name) = (dir.path().join("cache"), name.to_owned());
            let server = Server::start(move |request, stream| {
                let headers = honest();
                let mut headers: Vec<(&str, &str)> =
                    headers.iter().map(|(key, value)| (*key, value.as_str())).collect();
                headers.retain(|(key, _)| *key != lie);
                headers.push((lie, &name));
                reply(request, stream, "200 OK", &headers, TEXT);
            });
            let message = refused(&hub(&server, &cache, None));
            assert!(message.contains("the answer is not a hub's"), "{lie}: {message}");
            assert_eq!(entries(&cache), 0);
            assert_eq!(server.gets(), 0);
        }
    }
    assert_eq!(std::fs::read_to_string(dir.path().join("victim/rc")).unwrap(), "mine");
}

#[test]
fn names_that_lead_out_of_the_cache_are_not_even_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let server = serve(&[(URL, TEXT)], None);
    let hub = hub(&server, &dir.path().join("cache"), None);
    for bad in ["../../../../victim/ref", "/etc/x", "a//b", "", ".", "..", "a\\..\\b", "a\u{1b}[2J"] {
        let message = hub.fetch("owner/stories", bad, "data/a.txt").unwrap_err().to_string();
        assert!(message.contains("the revision ") && !message.contains('\u{1b}'), "{message}");
        assert!(hub.fetch("owner/stories", "main", bad).unwrap_err().to_string().contains("the file "));
        assert!(hub.fetch(bad, "main", "data/a.txt").unwrap_err().to_string().contains("the repository "));
    }
    assert!(server.heard().is_empty());
    assert_eq!(entries(dir.path()), 0);
}

#[test]
fn the_token_goes_to_the_endpoint_and_to_nobody_else() {
    let cache = tempfile::tempdir().unwrap();
    let store = Server::start(|request, stream| {
        // A store knows nothing of commits, and its entity tags are its own.
        reply(request, stream, "200 OK", &[("ETag", "\"store-1\"")], TEXT);
    });
    let at = format!("{}/signed?a=%22b%22", store.endpoint);
    let server = Server::start(move |request, stream| {
        let size = TEXT.len().to_string();
        let linked = format!("\"{}\"", lowkey_files::hash::hex(&sha2::Digest::finalize(sha256())));
        let headers = [
            ("Location", at.as_str()),
            ("X-Repo-Commit", "c0ffee"),
            ("X-Linked-Etag", &linked),
            ("X-Linked-Size", &size),
        ];
        reply(request, stream, "302 Found", &headers, b"");
    });
    assert_eq!(fetch(&hub(&server, cache.path(), Some("hf_secret"))).unwrap(), TEXT);
    let (asked, led) = (server.heard(), store.heard());
    assert!(asked.iter().all(|request| request.header("authorization") == Some("Bearer hf_secret")));
    assert!(!led.is_empty() && led.iter().all(|request| request.header("authorization").is_none()), "{led:?}");
    // The store was asked for the file alone, and the file bears the hub's name for it.
    assert!(led.iter().all(|request| !request.is_head() && request.path == "/signed?a=%22b%22"));
    assert_eq!(blobs(cache.path())[0].len(), 64);
}

fn sha256() -> sha2::Sha256 {
    sha2::Digest::chain_update(<sha2::Sha256 as sha2::Digest>::new(), TEXT)
}

#[test]
fn a_mirror_may_lead_to_another_hub_but_the_token_stays() {
    let cache = tempfile::tempdir().unwrap();
    let other = serve(&[(URL, TEXT)], None);
    let at = format!("{}{URL}", other.endpoint);
    let server = Server::start(move |request, stream| reply(request, stream, "308 Moved", &[("Location", &at)], b""));
    assert_eq!(fetch(&hub(&server, cache.path(), Some("hf_secret"))).unwrap(), TEXT);
    assert!(other.heard().iter().all(|request| request.header("authorization").is_none()));
}

#[test]
fn a_redirect_within_the_hub_is_followed_with_the_token() {
    let cache = tempfile::tempdir().unwrap();
    let server = Server::start(|request, stream| {
        if request.path == URL {
            return reply(
                request,
                stream,
                "307 Moved",
                &[("Location", "/api/cache/a.txt"), ("X-Repo-Commit", "c0ffee")],
                b"",
            );
        }
        assert_eq!((request.path.as_str(), request.header("authorization")), ("/api/cache/a.txt", Some("Bearer t")));
        send(request, stream, TEXT);
    });
    assert_eq!(fetch(&hub(&server, cache.path(), Some("t"))).unwrap(), TEXT);
}

#[test]
fn a_redirect_that_leads_nowhere_ends() {
    let cache = tempfile::tempdir().unwrap();
    for status in ["300 Multiple Choices", "301 Moved", "302 Found", "304 Not Modified", "308 Moved"] {
        for about in [true, false] {
            let server = Server::start(move |request, stream| {
                if about || !request.is_head() {
                    reply(request, stream, status, &[], b"");
                } else {
                    send(request, stream, TEXT);
                }
            });
            let message = refused(&hub(&server, cache.path(), None));
            assert!(message.contains(&format!("answered {} and leads nowhere", &status[..3])), "{message}");
        }
    }
    // To itself, in a circle, and ever further.
    for lead in [
        |_: &str| URL.to_owned(),
        |path: &str| if path == URL { "/b" } else { URL }.to_owned(),
        |path: &str| format!("{path}/x"),
    ] {
        let server = Server::start(move |request, stream| {
            reply(request, stream, "302 Found", &[("Location", &lead(&request.path))], b"");
        });
        let message = refused(&hub(&server, cache.path(), None));
        assert!(message.contains("redirects more than 10 times"), "{message}");
        assert_eq!(server.heard().len(), 11);
    }
    for (bad, expected) in
        [("ftp://a/b", "no address of a hub"), ("http://", "no address"), ("", "10 times"), ("a b\u{9b}", "no address")]
    {
        let server =
            Server::start(move |request, stream| reply(request, stream, "302 Found", &[("Location", bad)], b""));
        let message = refused(&hub(&server, cache.path(), None));
        assert!(message.contains(expected) && !message.contains('\u{9b}'), "{bad}: {message}");
    }
    assert!(blobs(cache.path()).is_empty());
}

/// Chunks without end, until the client goes away.
fn endless(stream: &mut TcpStream) -> usize {
    let mut sent = 0;
    while stream.write_all(format!("1000\r\n{}\r\n", "x".repeat(4096)).as_bytes()).is_ok() {
        sent += 4096;
    }
    sent
}

#[test]
fn a_body_without_end_does_not_fill_the_disk() {
    let cache = tempfile::tempdir().unwrap();
    // Of a file whose size is known.
    let server = lying(|_, stream| {
        head(stream, "200 OK", &[("Transfer-Encoding", "chunked")]);
        endless(stream);
    });
    let message = refused(&hub(&server, cache.path(), None));
    assert!(message.contains("more than the 32 bytes"), "{message}");
    assert!(blobs(cache.path()).is_empty());
    // Of one whose size nobody has told.
    let server = Server::start(|request, stream| {
        let headers = honest();
        let headers: Vec<(&str, &str)> = headers.iter().map(|(key, value)| (*key, value.as_str())).collect();
        head(stream, "200 OK", &[&headers[..], &[("Transfer-Encoding", "chunked")]].concat());
        if !request.is_head() {
            endless(stream);
        }
    });
    let message = refused(&hub(&server, cache.path(), None));
    assert!(message.contains("does not say how long the file is, and sends more than 65536 bytes"), "{message}");
    assert!(blobs(cache.path()).is_empty());
    // Of one that no disk holds.
    let server = Server::start(|request, stream| {
        let size = "999999999999999999";
        let headers = [("ETag", "abc"), ("X-Repo-Commit", "c0ffee"), ("X-Linked-Size", size), ("Content-Length", size)];
        head(stream, "200 OK", &headers);
        if !request.is_head() {
            while stream.write_all(&[0; 4096]).is_ok() {}
        }
    });
    let message = refused(&hub(&server, cache.path(), None));
    assert!(message.contains("the disk takes"), "{message}");
    assert!(blobs(cache.path()).is_empty());
}

#[test]
fn a_file_of_unknown_size_is_fetched_and_checked() {
    let cache = tempfile::tempdir().unwrap();
    let server = Server::start(|request, stream| {
        let headers = honest();
        let headers: Vec<(&str, &str)> = headers.iter().map(|(key, value)| (*key, value.as_str())).collect();
        head(stream, "200 OK", &[&headers[..], &[("Transfer-Encoding", "chunked")]].concat());
        if !request.is_head() {
            let text = std::str::from_utf8(TEXT).unwrap();
            let _ = stream.write_all(format!("{:x}\r\n{text}\r\n0\r\n\r\n", text.len()).as_bytes());
        }
    });
    assert_eq!(fetch(&hub(&server, cache.path(), None)).unwrap(), TEXT);
}

#[test]
fn an_answer_that_stalls_ends() {
    let cache = tempfile::tempdir().unwrap();
    let quick = |server: &Server| {
        let mut hub = hub(server, cache.path(), None);
        (hub.patience.answer, hub.patience.stall) = (Duration::from_millis(200), Duration::from_millis(100));
        (hub.patience.connect, hub.patience.retries) = (Duration::from_secs(5), 1);
        hub
    };
    let forever = Duration::from_secs(20);
    let started = Instant::now();
    // Before the first byte, in the middle of the headers, and byte by byte without end.
    let lies: [fn(&mut TcpStream); 3] = [
        |_| std::thread::sleep(Duration::from_secs(20)),
        |stream| {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nETag: ");
            std::thread::sleep(Duration::from_secs(20));
        },
        |stream| {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n");
            while stream.write_all(b"A: b\r\n").is_ok() {
                std::thread::sleep(Duration::from_millis(20));
            }
        },
    ];
    for lie in lies {
        let server = Server::start(move |_, stream| lie(stream));
        let message = refused(&quick(&server));
        assert!(
            message.contains("nothing arrived for 100ms") || message.contains("no answer within 200ms"),
            "{message}"
        );
        assert_eq!(server.heard().len(), 2);
    }
    // In the middle of the file: what has arrived is kept.
    let server = lying(move |_, stream| {
        head(stream, "200 OK", &[("Content-Length", "32")]);
        let _ = stream.write_all(&TEXT[..10]);
        std::thread::sleep(forever);
    });
    let message = refused(&quick(&server));
    assert!(message.contains("after 10 of 32 bytes (nothing arrived for 100ms)"), "{message}");
    assert_eq!(server.heard().last().unwrap().from(), 10);
    assert!(started.elapsed() < Duration::from_secs(15));
}

#[test]
fn a_slow_transfer_is_none_that_stalls() {
    let cache = tempfile::tempdir().unwrap();
    let server = lying(|_, stream| {
        head(stream, "200 OK", &[("Content-Length", "32")]);
        for byte in TEXT {
            let _ = stream.write_all(&[*byte]);
            std::thread::sleep(Duration::from_millis(60));
        }
    });
    let mut hub = hub(&server, cache.path(), None);
    (hub.patience.answer, hub.patience.stall) = (Duration::from_secs(1), Duration::from_secs(1));
    assert_eq!(fetch(&hub).unwrap(), TEXT);
    assert_eq!(server.gets(), 1);
}

#[test]
fn a_file_has_the_length_that_was_announced() {
    for (lie, expected) in [
        // Content-Length, bytes sent, what comes of it.
        (("32", 31), "broke off after 31 of 32 bytes"),
        (("31", 31), "sends 31 bytes of a file that has 32"),
        (("33", 33), "sends 33 bytes of a file that has 32"),
        (("0", 0), "sends 0 bytes of a file that has 32"),
    ] {
        let (announced, sent) = lie;
        let cache = tempfile::tempdir().unwrap();
        let server = lying(move |request, stream| {
            if request.from() > 0 {
                return reply(request, stream, "503 Busy", &[], b"");
            }
            head(stream, "200 OK", &[("Content-Length", announced)]);
            let _ = stream.write_all(&[TEXT, b"more"].concat()[..sent]);
        });
        let mut hub = hub(&server, cache.path(), None);
        hub.patience.retries = 0;
        let message = refused(&hub);
        assert!(message.contains(expected), "{message}");
        assert!(!blobs(cache.path()).contains(&git(TEXT)));
    }
    // Bytes after the announced ones are not of the file.
    let cache = tempfile::tempdir().unwrap();
    let server = lying(|_, stream| {
        head(stream, "200 OK", &[("Content-Length", "32")]);
        let _ = stream.write_all(&[TEXT, b"more"].concat());
    });
    assert_eq!(fetch(&hub(&server, cache.path(), None)).unwrap(), TEXT);
    // A length that is none.
    for size in ["many", "-1", "1e3", "99999999999999999999"] {
        let server = Server::start(move |request, stream| {
            let headers = [("ETag", "abc"), ("X-Repo-Commit", "c0ffee"), ("X-Linked-Size", size)];
            reply(request, stream, "200 OK", &headers, TEXT);
        });
        let cache = tempfile::tempdir().unwrap();
        let message = refused(&hub(&server, cache.path(), None));
        assert!(message.contains("its size is"), "{message}");
    }
}

#[test]
fn a_file_is_the_one_that_its_hash_names() {
    let other = *b"once upon a time there was a lie";
    let sha256 = lowkey_files::hash::hex(&sha2::Digest::finalize(sha256()));
    for (etag, body, kind) in [(sha256.clone(), other, "SHA-256"), (git(TEXT), other, "git hash")] {
        let cache = tempfile::tempdir().unwrap();
        let server = Server::start(move |request, stream| {
            reply(request, stream, "200 OK", &[("ETag", &etag), ("X-Repo-Commit", "c0ffee")], &body);
        });
        let message = refused(&hub(&server, cache.path(), None));
        assert!(message.contains("what arrived is not the file") && message.contains(kind), "{message}");
        assert_eq!(server.gets(), 1);
        assert!(blobs(cache.path()).is_empty());
    }
    // Some mirrors name files by their plain SHA-1, or in words of their own.
    let plain = lowkey_files::hash::hex(&sha1::Digest::finalize(sha1::Digest::chain_update(
        <sha1::Sha1 as sha1::Digest>::new(),
        TEXT,
    )));
    for etag in [sha256.to_uppercase(), plain, "5f3a-20".to_owned()] {
        let cache = tempfile::tempdir().unwrap();
        let server = Server::start(move |request, stream| {
            reply(request, stream, "200 OK", &[("ETag", &etag), ("X-Repo-Commit", "c0ffee")], TEXT);
        });
        assert_eq!(fetch(&hub(&server, cache.path(), None)).unwrap(), TEXT);
    }
}

#[test]
fn a_file_in_an_encoding_is_refused() {
    let cache = tempfile::tempdir().unwrap();
    for encoding in ["gzip", "br", "deflate, gzip", "\u{1b}[2J"] {
        let server = lying(move |request, stream| {
            reply(request, stream, "200 OK", &[("Content-Encoding", encoding)], TEXT);
        });
        let message = refused(&hub(&server, cache.path(), None));
        assert!(message.contains("encoding") || message.contains("not a hub's"), "{message}");
        assert!(!message.contains('\u{1b}'), "{message}");
        assert!(blobs(cache.path()).is_empty());
    }
    let server = lying(|request, stream| {
        reply(request, stream, "200 OK", &[("Content-Encoding", "identity")], TEXT);
    });
    assert_eq!(fetch(&hub(&server, cache.path(), None)).unwrap(), TEXT);
}

#[test]
fn what_is_no_http_is_an_error() {
    let cache = tempfile::tempdir().unwrap();
    let long = |line: &'static str| {
        move |stream: &mut TcpStream| {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n");
            // A client that reads on for ever would take all memory.
            while stream.write_all(line.repeat(1000).as_bytes()).is_ok() {}
        }
    };
    let say = |bytes: &'static [u8]| {
        move |stream: &mut TcpStream| {
            let _ = stream.write_all(bytes);
        }
    };
    let lies: Vec<Lie> = vec![
        Box::new(long("X-Long: yes, it is\r\n")),
        Box::new(long("x")),
        Box::new(say(b"")),
        Box::new(say(b"\0\x01\x02\xff\xfe\r\n\r\n")),
        Box::new(say(b"SSH-2.0-OpenSSH_9.6\r\n")),
        Box::new(say(b"HTTP/1.1 999999 \x1b[2J\r\n\r\n")),
        Box::new(say(b"HTTP/1.1 200 OK\r\n")),
        Box::new(say(b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n")),
        Box::new(say(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab")),
        Box::new(say(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")),
        Box::new(say(b"HTTP/1.1 200 OK\r\nno colon here\r\n\r\n")),
        Box::new(say(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")),
        Box::new(say(b"HTTP/1.1 204 No Content\r\n\r\n")),
        Box::new(say(b"HTTP/9.9 200 OK\r\n\r\n")),
        Box::new(say(b"<html>Please log in to this network</html>")),
    ];
    for (i, lie) in lies.into_iter().enumerate() {
        let lie = std::sync::Arc::new(lie);
        for about in [true, false] {
            let lie = std::sync::Arc::clone(&lie);
            let server =
                Server::start(
                    move |request, stream| {
                        if about || !request.is_head() { lie(stream) } else { send(request, stream, TEXT) }
                    },
                );
            let mut hub = hub(&server, cache.path(), None);
            (hub.patience.answer, hub.patience.retries) = (Duration::from_secs(5), 1);
            let message = refused(&hub);
            assert!(message.contains("owner/stories") && !message.contains('\u{1b}'), "{i}: {message}");
        }
        assert!(!blobs(cache.path()).contains(&git(TEXT)), "{i}");
    }
}

#[test]
fn a_status_says_what_to_do_and_only_what_may_pass_is_asked_again() {
    let cache = tempfile::tempdir().unwrap();
    for (status, expected, asked) in [
        ("400 Bad Request", "answered 400", 1),
        ("401 Unauthorized", "set HF_TOKEN", 1),
        ("403 Forbidden", "set HF_TOKEN", 1),
        ("404 Not Found", "check the repository", 1),
        ("410 Gone", "check the repository", 1),
        ("416 Range Not Satisfiable", "answered 416", 1),
        ("418 Teapot", "answered 418", 1),
        ("429 Too Many Requests", "answered 429; try again later", 3),
        ("451 Unavailable", "answered 451", 1),
        ("500 Internal Server Error", "answered 500; try again later", 3),
        ("501 Not Implemented", "answered 501", 1),
        ("502 Bad Gateway", "answered 502", 3),
        ("503 Unavailable", "answered 503; try again later", 3),
        ("504 Timeout", "answered 504", 3),
    ] {
        let server = Server::start(move |request, stream| {
            // A server cannot make the client sleep for a century.
            reply(request, stream, status, &[("Retry-After", "3155760000")], b"try later");
        });
        let message = refused(&hub(&server, cache.path(), None));
        assert!(message.contains(expected), "{message}");
        assert_eq!(server.heard().len(), asked, "{status}");
        // Asked for the file itself the answer means the same.
        let server = lying(move |request, stream| reply(request, stream, status, &[], b"try later"));
        let message = refused(&hub(&server, cache.path(), None));
        assert!(message.contains(expected), "{message}");
        assert_eq!(server.gets(), asked, "{status}");
    }
    // The store behind the hub has no token to be given.
    let store = Server::start(|request, stream| reply(request, stream, "403 Forbidden", &[], b""));
    let at = format!("{}/x", store.endpoint);
    let server = lying(move |request, stream| reply(request, stream, "302 Found", &[("Location", &at)], b""));
    let message = refused(&hub(&server, cache.path(), None));
    assert!(message.contains("refused (403) by 127.0.0.1, to which the hub leads"), "{message}");
}

#[test]
fn trouble_that_passes_is_waited_for() {
    let cache = tempfile::tempdir().unwrap();
    let asked = AtomicUsize::new(0);
    let server = Server::start(move |request, stream| match asked.fetch_add(1, Ordering::Relaxed) {
        0 => reply(request, stream, "429 Too Many Requests", &[("Retry-After", "0")], b""),
        2 => reply(request, stream, "503 Unavailable", &[], b""),
        _ => send(request, stream, TEXT),
    });
    assert_eq!(fetch(&hub(&server, cache.path(), None)).unwrap(), TEXT);
    assert_eq!(server.heard().len(), 5);
}

#[test]
fn a_part_that_was_not_asked_for_is_not_taken() {
    let lies: [&[(&str, &str)]; 4] = [
        &[("Content-Range", "bytes 9-31/32")],
        &[("Content-Range", "bytes 10-31/99")],
        &[("Content-Range", "ten")],
        &[],
    ];
    for lie in lies {
        let cache = tempfile::tempdir().unwrap();
        let folder = cache.path().join("datasets--owner--stories/blobs");
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join(format!("{}.incomplete", git(TEXT))), &TEXT[..10]).unwrap();
        let server = lying(move |request, stream| match request.from() {
            0 => send(request, stream, TEXT),
            from => reply(request, stream, "206 Partial Content", lie, &TEXT[from..]),
        });
        match fetch(&hub(&server, cache.path(), None)) {
            Ok(text) => assert_eq!(text, TEXT),
            Err(e) => assert!(e.to_string().contains("sends 99 bytes of a file that has 32"), "{e}"),
        }
    }
    // A server that knows no further bytes of what it announced, and refuses its own range.
    let cache = tempfile::tempdir().unwrap();
    let folder = cache.path().join("datasets--owner--stories/blobs");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join(format!("{}.incomplete", git(TEXT))), &TEXT[..10]).unwrap();
    let server = lying(|request, stream| match request.from() {
        0 => send(request, stream, TEXT),
        _ => reply(request, stream, "416 Range Not Satisfiable", &[("Content-Range", "bytes */32")], b""),
    });
    assert_eq!(fetch(&hub(&server, cache.path(), None)).unwrap(), TEXT);
}

#[test]
fn a_repository_that_changes_while_it_is_asked_is_asked_again() {
    let cache = tempfile::tempdir().unwrap();
    let asked = AtomicUsize::new(0);
    let server = Server::start(move |request, stream| {
        let first = asked.fetch_add(1, Ordering::Relaxed) == 0;
        let (body, commit): (&[u8], &str) = if first { (b"the text before", "aaaa") } else { (TEXT, "bbbb") };
        reply(request, stream, "200 OK", &[("ETag", &git(body)), ("X-Repo-Commit", commit)], body);
    });
    assert_eq!(fetch(&hub(&server, cache.path(), None)).unwrap(), TEXT);
    assert_eq!(std::fs::read(cache.path().join("datasets--owner--stories/refs/main")).unwrap(), b"bbbb");
    assert_eq!(blobs(cache.path()), [git(TEXT)]);
}
