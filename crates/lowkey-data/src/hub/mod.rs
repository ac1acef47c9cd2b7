//! Files of dataset repositories on the Hugging Face hub, or on a mirror that speaks its protocol.

use std::env;
use std::path::{Path, PathBuf};

use hf_hub::api::sync::{ApiBuilder, ApiError};
use hf_hub::{Cache, Repo, RepoType};

use crate::error::{Error, Result};

/// Where the hub is, who asks, and where its files are kept.
#[derive(Clone)]
pub struct HubConfig {
    /// The server, as `https://huggingface.co`.
    pub endpoint: String,
    /// An access token, needed for private and gated repositories.
    pub token: Option<String>,
    /// The cache, in the layout that all Hugging Face tools share.
    pub cache: PathBuf,
}

impl HubConfig {
    /// As the Hugging Face tools do it: `HF_ENDPOINT`; `HF_TOKEN`, else the file `token` under `HF_HOME`; and
    /// `HF_HOME/hub` for the cache, `HF_HOME` being `~/.cache/huggingface` unless set.
    pub fn from_env() -> Self {
        let set = |name: &str| env::var(name).ok().filter(|value| !value.trim().is_empty());
        let home = set("HF_HOME").map(PathBuf::from).unwrap_or_else(|| {
            // Without a home folder the cache lies in the working folder, where it is at least seen.
            env::home_dir().unwrap_or_default().join(".cache").join("huggingface")
        });
        let saved = || std::fs::read_to_string(home.join("token")).ok();
        let token = set("HF_TOKEN").or_else(saved).map(|token| token.trim().to_owned());
        Self {
            endpoint: set("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned()),
            token: token.filter(|token| !token.is_empty()),
            cache: home.join("hub"),
        }
    }

    /// The local copy of one file of a dataset repository, fetched unless the cache has it.
    pub fn fetch(&self, repo: &str, revision: &str, file: &str) -> Result<PathBuf> {
        let fail = |message: String| Error::Hub {
            repo: repo.to_owned(),
            file: file.to_owned(),
            revision: revision.to_owned(),
            endpoint: self.endpoint.clone(),
            message,
        };
        if !self.endpoint.starts_with("http://") && !self.endpoint.starts_with("https://") {
            return Err(fail("HF_ENDPOINT must start with http:// or https://".to_owned()));
        }
        // The cache links its entries to each other and needs to know where it is.
        let cache = std::path::absolute(&self.cache).map_err(Error::io("find", &self.cache))?;
        let api = ApiBuilder::from_cache(Cache::new(cache.clone()))
            .with_endpoint(self.endpoint.trim_end_matches('/').to_owned())
            .with_token(self.token.clone())
            .with_progress(false)
            .with_retries(2)
            .build()
            .map_err(|e| fail(e.to_string()))?;
        let repository = Repo::with_revision(repo.to_owned(), RepoType::Dataset, revision.to_owned());
        api.repo(repository).get(file).map_err(|e| fail(self.explain(&e, &cache)))
    }

    /// What an answer means and what to do about it.
    fn explain(&self, error: &ApiError, cache: &Path) -> String {
        match status(error) {
            Some(status @ (401 | 403)) if self.token.is_some() => format!(
                "access refused ({status}); the token in HF_TOKEN is not valid, or its account has not been given access to this repository (there may be terms to accept), or there is no such repository"
            ),
            Some(status @ (401 | 403)) => format!(
                "access refused ({status}); set HF_TOKEN to an access token if the repository is private or gated, and check its name: the hub answers the same for one that does not exist"
            ),
            Some(404) => "not found (404); check the repository, the revision and the file's path in it".to_owned(),
            Some(status) => format!("the server answered {status}; try again later, or another HF_ENDPOINT"),
            None => match error {
                ApiError::LockAcquisition(path) => {
                    format!("another process is fetching it ({} is locked); wait for it", path.display())
                }
                ApiError::IoError(e) => format!("{e}; is the cache {} writable and not full?", cache.display()),
                ApiError::MissingHeader(_) | ApiError::InvalidHeader(_) | ApiError::ParseIntError(_) => {
                    format!("the answer is not a hub's ({error}); does HF_ENDPOINT name a hub?")
                }
                other => format!("{other}; check the network and HF_ENDPOINT"),
            },
        }
    }
}

impl std::fmt::Debug for HubConfig {
    /// The token is a secret and is not shown.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let token = self.token.as_ref().map(|_| "hidden");
        f.debug_struct("HubConfig")
            .field("endpoint", &self.endpoint)
            .field("token", &token)
            .field("cache", &self.cache)
            .finish()
    }
}

/// The HTTP status behind an error. The client's own error type is not re-exported by the hub's crate, so this reads
/// its message, "http status: 404"; a test holds it to that.
fn status(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::TooManyRetries(inner) => status(inner),
        ApiError::RequestError(inner) => inner.to_string().strip_prefix("http status: ")?.trim().parse().ok(),
        _ => None,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::collections::HashMap;
    use std::io::{BufRead, BufReader, Write};
    use std::net::TcpListener;
    use std::sync::{Arc, Mutex};

    /// A hub on the loopback: files by URL path, and what was asked of it. Ends with the test's process.
    pub(crate) struct Server {
        pub(crate) endpoint: String,
        pub(crate) requests: Arc<Mutex<Vec<String>>>,
    }

    /// Serves `files`; with a token, only to who presents it.
    pub(crate) fn serve(files: &[(&str, &[u8])], token: Option<&'static str>) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let files: HashMap<String, Vec<u8>> =
            files.iter().map(|(path, body)| ((*path).into(), body.to_vec())).collect();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&requests);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(|line| line.ok());
                let Some(request) = lines.next() else { continue };
                let headers: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
                let header = |name: &str| {
                    headers.iter().find_map(|h| {
                        let (key, value) = h.split_once(':')?;
                        key.eq_ignore_ascii_case(name).then(|| value.trim().to_owned())
                    })
                };
                let path = request.split(' ').nth(1).unwrap().to_owned();
                log.lock().unwrap().push(path.clone());
                let allowed = token.is_none_or(|t| header("authorization") == Some(format!("Bearer {t}")));
                let (status, body, range) = match files.get(&path) {
                    _ if !allowed => ("401 Unauthorized", &b""[..], None),
                    None => ("404 Not Found", &b""[..], None),
                    Some(body) => {
                        let range = header("range").expect("hf-hub asks for ranges");
                        let (from, to) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
                        let from: usize = from.parse().unwrap();
                        let to = to.parse().map_or(body.len(), |to: usize| to + 1);
                        let range = format!("bytes {from}-{}/{}", to - 1, body.len());
                        ("206 Partial Content", &body[from..to], Some(range))
                    }
                };
                let mut head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n", body.len());
                if let Some(range) = range {
                    let etag = crate::tokenizer::hex(&path.bytes().collect::<Vec<u8>>());
                    head += &format!("Content-Range: {range}\r\nETag: \"{etag}\"\r\nX-Repo-Commit: c0ffee\r\n");
                }
                stream.write_all(format!("{head}\r\n").as_bytes()).unwrap();
                stream.write_all(body).unwrap();
            }
        });
        Server { endpoint, requests }
    }

    pub(crate) fn hub(server: &Server, cache: &Path, token: Option<&str>) -> HubConfig {
        HubConfig { endpoint: server.endpoint.clone(), token: token.map(str::to_owned), cache: cache.to_path_buf() }
    }

    const URL: &str = "/datasets/owner/stories/resolve/main/data/a.txt";

    #[test]
    fn a_file_is_fetched_once_and_then_comes_from_the_cache() {
        let cache = tempfile::tempdir().unwrap();
        let server = serve(&[(URL, b"once upon a time")], None);
        let hub = hub(&server, cache.path(), None);
        let path = hub.fetch("owner/stories", "main", "data/a.txt").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"once upon a time");
        assert!(path.starts_with(cache.path()));
        let asked = server.requests.lock().unwrap().len();
        assert!(asked > 0 && server.requests.lock().unwrap().iter().all(|path| path == URL));
        assert_eq!(hub.fetch("owner/stories", "main", "data/a.txt").unwrap(), path);
        assert_eq!(server.requests.lock().unwrap().len(), asked);
    }

    #[test]
    fn a_gated_file_needs_the_token_and_the_error_says_so() {
        let cache = tempfile::tempdir().unwrap();
        let server = serve(&[(URL, b"secret")], Some("hf_right"));
        let fetch = |token| hub(&server, cache.path(), token).fetch("owner/stories", "main", "data/a.txt");
        let message = fetch(None).unwrap_err().to_string();
        assert!(message.contains("refused (401); set HF_TOKEN") && message.contains("owner/stories"), "{message}");
        let message = fetch(Some("hf_wrong")).unwrap_err().to_string();
        assert!(message.contains("the token in HF_TOKEN is not valid") && !message.contains("hf_wrong"), "{message}");
        assert_eq!(std::fs::read(fetch(Some("hf_right")).unwrap()).unwrap(), b"secret");
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
    fn a_server_that_is_no_hub_or_not_there_is_an_error() {
        let cache = tempfile::tempdir().unwrap();
        let fetch = |endpoint: String| {
            let hub = HubConfig { endpoint, token: None, cache: cache.path().to_path_buf() };
            hub.fetch("a/b", "main", "c").unwrap_err().to_string()
        };
        assert!(fetch("ftp://x".into()).contains("HF_ENDPOINT must start with"));
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        assert!(fetch(format!("http://{port}")).contains("check the network and HF_ENDPOINT"));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let lines = BufReader::new(stream.try_clone().unwrap()).lines();
                assert!(lines.map_while(|line| line.ok()).take_while(|line| !line.is_empty()).count() > 0);
                stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi").unwrap();
            }
        });
        assert!(fetch(endpoint).contains("does HF_ENDPOINT name a hub?"));
    }
}
