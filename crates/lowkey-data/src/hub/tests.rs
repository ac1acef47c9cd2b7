//! A hub that tells the truth, and one test for each way in which it may not.

mod lies;
mod server;

use super::*;
use std::collections::HashMap;
use std::net::TcpListener;
use std::path::Path;

use server::{Request, Server, git, reply, send};

/// Serves `files` by URL path; with a token, only to who presents it.
pub(crate) fn serve(files: &[(&str, &[u8])], token: Option<&'static str>) -> Server {
    let files: HashMap<String, Vec<u8>> = files.iter().map(|(path, body)| ((*path).into(), body.to_vec())).collect();
    Server::start(move |request, stream| {
        let allowed = token.is_none_or(|t| request.header("authorization") == Some(&format!("Bearer {t}")));
        match files.get(&request.path) {
            _ if !allowed => reply(request, stream, "401 Unauthorized", &[], b""),
            None => reply(request, stream, "404 Not Found", &[], b""),
            Some(body) => send(request, stream, body),
        }
    })
}

/// Asks `server`: patient, but not for long where it is asked again.
pub(crate) fn hub(server: &Server, cache: &Path, token: Option<&str>) -> HubConfig {
    HubConfig {
        endpoint: server.endpoint.clone(),
        token: token.map(str::to_owned),
        cache: cache.to_path_buf(),
        offline: false,
        patience: Patience {
            lock: Duration::from_millis(200),
            retries: 2,
            pause: Duration::from_millis(1),
            longest_pause: Duration::from_millis(20),
            largest_unannounced: 1 << 16,
            ..Patience::default()
        },
    }
}

const URL: &str = "/datasets/owner/stories/resolve/main/data/a.txt";
const TEXT: &[u8] = b"once upon a time there was a hub";

/// Fetches the one file.
fn fetch(hub: &HubConfig) -> Result<Vec<u8>> {
    hub.fetch("owner/stories", "main", "data/a.txt").map(|path| std::fs::read(path).unwrap())
}

fn refused(hub: &HubConfig) -> String {
    fetch(hub).unwrap_err().to_string()
}

fn blobs(cache: &Path) -> Vec<String> {
    let Ok(entries) = cache.join("datasets--owner--stories/blobs").read_dir() else { return Vec::new() };
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn a_file_is_fetched_once_and_then_comes_from_the_cache() {
    let cache = tempfile::tempdir().unwrap();
    let server = serve(&[(URL, TEXT)], None);
    let hub = hub(&server, cache.path(), None);
    let path = hub.fetch("owner/stories", "main", "data/a.txt").unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), TEXT);
    assert!(path.starts_with(cache.path()));
    let asked = server.heard();
    assert!(asked.len() == 2 && asked.iter().all(|request| request.path == URL));
    assert!(asked.iter().all(|request| request.header("accept-encoding") == Some("identity")));
    assert_eq!(hub.fetch("owner/stories", "main", "data/a.txt").unwrap(), path);
    // The commit itself leads to the same file.
    assert_eq!(hub.fetch("owner/stories", "c0ffee", "data/a.txt").unwrap(), path);
    assert_eq!(server.heard().len(), 2);
}

#[test]
fn the_cache_is_that_of_all_hugging_face_tools() {
    let cache = tempfile::tempdir().unwrap();
    let server = serve(&[(URL, TEXT)], None);
    fetch(&hub(&server, cache.path(), None)).unwrap();
    let repo = cache.path().join("datasets--owner--stories");
    assert_eq!(std::fs::read_to_string(repo.join("refs/main")).unwrap(), "c0ffee");
    assert_eq!(std::fs::read(repo.join("blobs").join(git(TEXT))).unwrap(), TEXT);
    assert_eq!(blobs(cache.path()), [git(TEXT)]);
    let pointer = repo.join("snapshots/c0ffee/data/a.txt");
    #[cfg(unix)]
    assert_eq!(std::fs::read_link(&pointer).unwrap(), Path::new("../../../blobs").join(git(TEXT)));
    // What another tool has put there is found. Where its file is gone, it is fetched again.
    std::fs::create_dir_all(repo.join("snapshots/abcdef")).unwrap();
    std::fs::create_dir_all(repo.join("refs/feature")).unwrap();
    std::fs::write(repo.join("snapshots/abcdef/b.txt"), "by hand").unwrap();
    std::fs::write(repo.join("refs/feature/x"), "abcdef\n").unwrap();
    let hub = hub(&server, cache.path(), None);
    let asked = server.heard().len();
    assert_eq!(std::fs::read(hub.fetch("owner/stories", "feature/x", "b.txt").unwrap()).unwrap(), b"by hand");
    assert_eq!(server.heard().len(), asked);
    std::fs::remove_file(repo.join("blobs").join(git(TEXT))).unwrap();
    assert_eq!(fetch(&hub).unwrap(), TEXT);
    assert!(server.heard().len() > asked);
    // A reference that leads out of the cache is none.
    std::fs::write(cache.path().join("outside.txt"), "outside").unwrap();
    std::fs::write(repo.join("refs/evil"), "../../..").unwrap();
    hub.fetch("owner/stories", "evil", "outside.txt").unwrap_err();
}

#[test]
fn offline_the_cache_alone_is_asked() {
    let cache = tempfile::tempdir().unwrap();
    let server = serve(&[(URL, TEXT)], None);
    let mut hub = hub(&server, cache.path(), None);
    hub.offline = true;
    let message = refused(&hub);
    assert!(message.contains("HF_HUB_OFFLINE") && message.contains("data/a.txt"), "{message}");
    assert!(server.heard().is_empty());
    hub.offline = false;
    fetch(&hub).unwrap();
    hub.offline = true;
    assert_eq!(fetch(&hub).unwrap(), TEXT);
    // So it is when there is no network.
    hub.offline = false;
    hub.endpoint = "http://127.0.0.1:1".to_owned();
    assert_eq!(fetch(&hub).unwrap(), TEXT);
}

#[test]
fn a_gated_file_needs_the_token_and_the_error_says_so() {
    let cache = tempfile::tempdir().unwrap();
    let server = serve(&[(URL, b"secret")], Some("hf_right"));
    let message = refused(&hub(&server, cache.path(), None));
    assert!(message.contains("refused (401); set HF_TOKEN") && message.contains("owner/stories"), "{message}");
    let message = refused(&hub(&server, cache.path(), Some("hf_wrong")));
    assert!(message.contains("the token in HF_TOKEN is not valid") && !message.contains("hf_wrong"), "{message}");
    let message = refused(&hub(&server, cache.path(), Some("hf_\u{1b}x")));
    assert!(message.contains("HF_TOKEN holds characters") && !message.contains("hf_"), "{message}");
    assert_eq!(fetch(&hub(&server, cache.path(), Some("hf_right"))).unwrap(), b"secret");
    assert!(!format!("{:?}", hub(&server, cache.path(), Some("hf_right"))).contains("hf_right"));
}

#[test]
fn what_is_missing_is_named() {
    let cache = tempfile::tempdir().unwrap();
    let server = serve(&[(URL, b"x")], None);
    let message = hub(&server, cache.path(), None).fetch("owner/stories", "v2", "b.txt").unwrap_err().to_string();
    for part in ["owner/stories", "b.txt", "v2", "not found (404)", &server.endpoint] {
        assert!(message.contains(part), "{message}");
    }
}

#[test]
fn names_with_other_signs_arrive_as_they_are() {
    let cache = tempfile::tempdir().unwrap();
    let url = "/datasets/owner/stories/resolve/refs%2Fconvert%2Fparquet/a%20b/50%25%3F%23%C3%BC.txt";
    let server = serve(&[(url, TEXT)], None);
    let hub = hub(&server, cache.path(), None);
    let path = hub.fetch("owner/stories", "refs/convert/parquet", "a b/50%?#ü.txt").unwrap();
    assert_eq!(std::fs::read(path).unwrap(), TEXT);
    assert!(cache.path().join("datasets--owner--stories/refs/refs/convert/parquet").is_file());
}

#[test]
fn an_empty_file_is_a_file() {
    let cache = tempfile::tempdir().unwrap();
    let server = serve(&[(URL, b"")], None);
    assert_eq!(fetch(&hub(&server, cache.path(), None)).unwrap(), b"");
}

#[test]
fn a_server_that_is_no_hub_or_not_there_is_an_error() {
    let cache = tempfile::tempdir().unwrap();
    let server = Server::start(|request, stream| reply(request, stream, "200 OK", &[], b"hi"));
    let ask = |endpoint: &str| {
        let hub = HubConfig { endpoint: endpoint.to_owned(), ..hub(&server, cache.path(), None) };
        refused(&hub)
    };
    assert!(ask("ftp://x").contains("HF_ENDPOINT must start with"));
    for bad in ["http://", "https:///a", "http://a b", "http://a?b=c"] {
        assert!(ask(bad).contains("HF_ENDPOINT"), "{bad}: {}", ask(bad));
    }
    let message = ask("https://me:secret@hub.org");
    assert!(message.contains("HF_TOKEN instead") && !message.contains("secret"), "{message}");
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let message = ask(&format!("http://{port}"));
    assert!(message.contains("check the network and HF_ENDPOINT"), "{message}");
    assert!(server.heard().is_empty());
    let message = ask(&server.endpoint);
    assert!(message.contains("does HF_ENDPOINT name a hub?"), "{message}");
}

#[test]
fn the_environment_is_read_as_the_hugging_face_tools_read_it() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("token"), "hf_saved\n").unwrap();
    let read = |variables: &[(&str, &str)]| {
        let variables: HashMap<String, OsString> =
            variables.iter().map(|(name, value)| ((*name).to_owned(), OsString::from(value))).collect();
        HubConfig::from_variables(|name| variables.get(name).cloned())
    };
    let home = dir.path().to_str().unwrap();
    let hub = read(&[("HF_HOME", home)]);
    assert_eq!((hub.cache, hub.token.as_deref()), (dir.path().join("hub"), Some("hf_saved")));
    assert_eq!(
        (hub.endpoint.as_str(), hub.offline, hub.patience),
        ("https://huggingface.co", false, Patience::default())
    );
    let hub = read(&[
        ("HF_HOME", home),
        ("HF_TOKEN", " hf_set "),
        ("HF_HUB_CACHE", "/elsewhere"),
        ("HF_ENDPOINT", "https://mirror.org"),
        ("HF_HUB_OFFLINE", "True"),
        ("HF_HUB_ETAG_TIMEOUT", "3"),
        ("HF_HUB_DOWNLOAD_TIMEOUT", "7"),
    ]);
    assert_eq!((hub.cache, hub.token.as_deref()), (PathBuf::from("/elsewhere"), Some("hf_set")));
    assert_eq!((hub.endpoint.as_str(), hub.offline), ("https://mirror.org", true));
    assert_eq!((hub.patience.connect.as_secs(), hub.patience.answer.as_secs()), (3, 3));
    assert_eq!(hub.patience.stall.as_secs(), 7);
    let hub = read(&[("XDG_CACHE_HOME", home), ("HF_HUB_OFFLINE", "0"), ("HF_HUB_ETAG_TIMEOUT", "soon")]);
    assert_eq!((hub.cache, hub.offline), (dir.path().join("huggingface/hub"), false));
    assert_eq!(hub.patience, Patience::default());
    let hub = read(&[("HF_HOME", "/none"), ("HF_TOKEN_PATH", dir.path().join("token").to_str().unwrap())]);
    assert_eq!(hub.token.as_deref(), Some("hf_saved"));
}

#[test]
fn two_that_want_the_same_file_fetch_it_once() {
    let cache = tempfile::tempdir().unwrap();
    let server = Server::start(|request, stream| {
        if !request.is_head() {
            std::thread::sleep(Duration::from_millis(300));
        }
        send(request, stream, TEXT);
    });
    let mut hub = hub(&server, cache.path(), None);
    hub.patience.lock = Duration::from_secs(20);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| assert_eq!(fetch(&hub).unwrap(), TEXT));
        }
    });
    assert_eq!(server.gets(), 1);
    // Another tool's lock is respected, and not waited for without end.
    std::fs::remove_dir_all(cache.path().join("datasets--owner--stories")).unwrap();
    let path = cache.path().join(".locks/datasets--owner--stories").join(format!("{}.lock", git(TEXT)));
    let held = std::fs::File::create(path).unwrap();
    held.lock().unwrap();
    hub.patience.lock = Duration::from_millis(100);
    let message = refused(&hub);
    assert!(message.contains("another process") && message.contains(".lock"), "{message}");
    drop(held);
    assert_eq!(fetch(&hub).unwrap(), TEXT);
}

/// Sends at most so many bytes of the file, then ends.
fn cut(request: &Request, stream: &mut std::net::TcpStream, most: usize, ranges: bool) {
    use std::io::Write;
    let from = if ranges { request.from() } else { 0 };
    let (etag, length) = (git(TEXT), (TEXT.len() - from).to_string());
    let range = format!("bytes {from}-{}/{}", TEXT.len() - 1, TEXT.len());
    let mut headers = vec![("ETag", etag.as_str()), ("X-Repo-Commit", "c0ffee"), ("Content-Length", &length)];
    if from > 0 {
        headers.push(("Content-Range", &range));
    }
    server::head(stream, if from > 0 { "206 Partial Content" } else { "200 OK" }, &headers);
    if !request.is_head() {
        let _ = stream.write_all(&TEXT[from..TEXT.len().min(from + most)]);
    }
}

#[test]
fn a_transfer_that_broke_off_goes_on_where_it_was() {
    let cache = tempfile::tempdir().unwrap();
    let server = Server::start(|request, stream| cut(request, stream, 20, true));
    let mut hub = hub(&server, cache.path(), None);
    assert_eq!(fetch(&hub).unwrap(), TEXT);
    let asked: Vec<usize> = server.heard().iter().filter(|r| !r.is_head()).map(Request::from).collect();
    assert_eq!(asked, [0, 20]);
    // So it does when the process ended in between.
    std::fs::remove_dir_all(cache.path()).unwrap();
    hub.patience.retries = 0;
    let message = refused(&hub);
    assert!(message.contains("broke off after 20 of 32 bytes"), "{message}");
    assert_eq!(blobs(cache.path()), [format!("{}.incomplete", git(TEXT))]);
    assert_eq!(fetch(&hub).unwrap(), TEXT);
    assert_eq!(server.heard().last().unwrap().from(), 20);
    assert_eq!(blobs(cache.path()), [git(TEXT)]);
}

#[test]
fn a_server_without_ranges_begins_again_and_is_not_asked_for_ever() {
    let cache = tempfile::tempdir().unwrap();
    let server = Server::start(|request, stream| cut(request, stream, 20, false));
    let message = refused(&hub(&server, cache.path(), None));
    assert!(message.contains("broke off after 20 of 32 bytes"), "{message}");
    assert_eq!(server.gets(), 3);
    let server = Server::start(|request, stream| cut(request, stream, 32, false));
    assert_eq!(fetch(&hub(&server, cache.path(), None)).unwrap(), TEXT);
    assert_eq!(server.heard().last().unwrap().from(), 20);
}

#[test]
fn a_part_that_is_not_of_this_file_is_not_kept() {
    let server = serve(&[(URL, TEXT)], None);
    for (part, gets) in [(&b"once upon another day"[..], 2), (&[b'x'; 32], 1), (&[b'x'; 99], 1)] {
        let cache = tempfile::tempdir().unwrap();
        let blobs_folder = cache.path().join("datasets--owner--stories/blobs");
        std::fs::create_dir_all(&blobs_folder).unwrap();
        std::fs::write(blobs_folder.join(format!("{}.incomplete", git(TEXT))), part).unwrap();
        // What arrived of another version of the file lies under another name.
        std::fs::write(blobs_folder.join("0123.incomplete"), part).unwrap();
        let before = server.gets();
        assert_eq!(fetch(&hub(&server, cache.path(), None)).unwrap(), TEXT);
        assert_eq!(server.gets() - before, gets);
    }
    // A file of the wrong length under the name of this one is fetched anew.
    let cache = tempfile::tempdir().unwrap();
    let blobs_folder = cache.path().join("datasets--owner--stories/blobs");
    std::fs::create_dir_all(&blobs_folder).unwrap();
    std::fs::write(blobs_folder.join(git(TEXT)), "short").unwrap();
    assert_eq!(fetch(&hub(&server, cache.path(), None)).unwrap(), TEXT);
}
