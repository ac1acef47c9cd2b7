//! A hub on the loopback that answers as a test bids it, and remembers what it was asked. Ends with the test's process.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use sha1::{Digest, Sha1};

/// What was asked.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) method: String,
    pub(crate) path: String,
    headers: Vec<(String, String)>,
}

impl Request {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    pub(crate) fn is_head(&self) -> bool {
        self.method == "HEAD"
    }

    /// The byte from which on the file is asked for.
    pub(crate) fn from(&self) -> usize {
        let range = self.header("range").and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-'));
        range.map_or(0, |from| from.parse().unwrap())
    }
}

pub(crate) struct Server {
    pub(crate) endpoint: String,
    heard: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    /// One request a connection, each in a thread of its own.
    pub(crate) fn start(answer: impl Fn(&Request, &mut TcpStream) + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let heard = Arc::new(Mutex::new(Vec::new()));
        let (log, answer) = (Arc::clone(&heard), Arc::new(answer));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (mut stream, log, answer) = (stream.unwrap(), Arc::clone(&log), Arc::clone(&answer));
                std::thread::spawn(move || {
                    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(|line| line.ok());
                    let Some(first) = lines.next() else { return };
                    let (method, path) = first.split_once(' ').unwrap();
                    let headers = lines.take_while(|line| !line.is_empty()).filter_map(|line| {
                        let (key, value) = line.split_once(':')?;
                        Some((key.to_owned(), value.trim().to_owned()))
                    });
                    let path = path.split(' ').next().unwrap().to_owned();
                    let request = Request { method: method.to_owned(), path, headers: headers.collect() };
                    log.lock().unwrap().push(request.clone());
                    answer(&request, &mut stream);
                });
            }
        });
        Self { endpoint, heard }
    }

    pub(crate) fn heard(&self) -> Vec<Request> {
        self.heard.lock().unwrap().clone()
    }

    /// How many of the requests were for the file itself.
    pub(crate) fn gets(&self) -> usize {
        self.heard().iter().filter(|request| !request.is_head()).count()
    }
}

/// An answer's first line and headers. The client may have gone away; that is its right.
pub(crate) fn head(stream: &mut TcpStream, status: &str, headers: &[(&str, &str)]) {
    let headers: String = headers.iter().map(|(key, value)| format!("{key}: {value}\r\n")).collect();
    let _ = stream.write_all(format!("HTTP/1.1 {status}\r\nConnection: close\r\n{headers}\r\n").as_bytes());
}

/// An answer with a body of its own length, which a HEAD does not get.
pub(crate) fn reply(request: &Request, stream: &mut TcpStream, status: &str, headers: &[(&str, &str)], body: &[u8]) {
    let length = body.len().to_string();
    head(stream, status, &[headers, &[("Content-Length", length.as_str())]].concat());
    if !request.is_head() {
        let _ = stream.write_all(body);
    }
}

/// The name that the hub gives a small file.
pub(crate) fn git(body: &[u8]) -> String {
    let digest = Sha1::new().chain_update(format!("blob {}\0", body.len())).chain_update(body);
    lowkey_files::hash::hex(&digest.finalize())
}

/// As the hub sends a small file, or a part of it.
pub(crate) fn send(request: &Request, stream: &mut TcpStream, body: &[u8]) {
    let etag = format!("\"{}\"", git(body));
    let headers = [("ETag", etag.as_str()), ("X-Repo-Commit", "c0ffee")];
    let from = request.from();
    if from == 0 {
        return reply(request, stream, "200 OK", &headers, body);
    }
    let range = format!("bytes {from}-{}/{}", body.len() - 1, body.len());
    let headers = [&headers[..], &[("Content-Range", range.as_str())]].concat();
    reply(request, stream, "206 Partial Content", &headers, &body[from..]);
}
