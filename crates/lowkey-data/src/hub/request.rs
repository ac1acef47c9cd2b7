//! Requests: who is shown the token, where a redirect may lead, and how long an answer may take.

use std::time::Duration;

use iri_string::types::{UriAbsoluteStr, UriReferenceStr};
use lowkey_files::printable;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use ureq::http::header::{AUTHORIZATION, CONTENT_LENGTH, ETAG, HeaderValue, LOCATION, RANGE, RETRY_AFTER};
use ureq::http::{Method, Response, Uri};
use ureq::{Agent, Body, Timeout};

use super::Patience;
use super::names::is_tag;

/// A hub leads to its store in two or three steps; a circle has no end.
const MOST_REDIRECTS: usize = 10;
/// What stands in a URL as it is.
const PLAIN: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// Why an attempt failed.
#[derive(Debug)]
pub(super) enum Fault {
    /// The next attempt would fail as well.
    Final(String),
    /// The next attempt may succeed, after the pause that the server asks for.
    Passing(String, Option<Duration>),
}

/// What the hub says about a file before sending it.
#[derive(Debug)]
pub(super) struct Described {
    /// The commit that the revision stands for.
    pub(super) commit: String,
    /// The name of the content: its SHA-256, its git hash, or what a mirror puts in their place.
    pub(super) etag: String,
    /// Bytes, where the hub says so.
    pub(super) size: Option<u64>,
}

/// Asks one hub.
pub(super) struct Client<'a> {
    agent: Agent,
    /// The server, without a slash at its end.
    base: &'a str,
    endpoint: Uri,
    token: Option<HeaderValue>,
    patience: &'a Patience,
}

impl<'a> Client<'a> {
    pub(super) fn new(endpoint: &'a str, token: Option<&str>, patience: &'a Patience) -> Result<Self, Fault> {
        let refuse = |why: &str| Err(Fault::Final(format!("HF_ENDPOINT {why}")));
        if !endpoint.starts_with("http://") && !endpoint.starts_with("https://") {
            return refuse("must start with http:// or https://");
        }
        let base = endpoint.trim_end_matches('/');
        let Ok(uri) = base.parse::<Uri>() else {
            return refuse("is not the address of a server");
        };
        if uri.scheme().is_none() || uri.query().is_some() || uri.host().is_none_or(str::is_empty) {
            return refuse("must be the address of a server, as https://huggingface.co");
        }
        if uri.authority().is_some_and(|authority| authority.as_str().contains('@')) {
            return refuse("holds a user's name or password; give an access token in HF_TOKEN instead");
        }
        let token = token.map(|token| HeaderValue::from_str(&format!("Bearer {token}"))).transpose();
        let Ok(mut token) = token else {
            return Err(Fault::Final("HF_TOKEN holds characters that no access token has".to_owned()));
        };
        if let Some(token) = &mut token {
            token.set_sensitive(true);
        }
        // Redirects are followed here, because it is decided anew at each whether the token goes along. Compression is
        // declined: lengths and hashes are those of the file.
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .accept_encoding("identity")
            .user_agent(concat!("lowkey/", env!("CARGO_PKG_VERSION")))
            .timeout_resolve(Some(patience.connect))
            .timeout_connect(Some(patience.connect))
            .timeout_send_request(Some(patience.answer))
            .timeout_recv_response(Some(patience.answer))
            .timeout_per_read(Some(patience.stall))
            .build()
            .new_agent();
        Ok(Self { agent, base, endpoint: uri, token, patience })
    }

    /// Where a file lies. The names are checked ones.
    pub(super) fn url(&self, repo: &str, revision: &str, file: &str) -> Result<Uri, Fault> {
        let encoded = |part: &str| utf8_percent_encode(part, PLAIN).to_string();
        let file: Vec<String> = file.split('/').map(encoded).collect();
        let url = format!("{}/datasets/{repo}/resolve/{}/{}", self.base, encoded(revision), file.join("/"));
        url.parse().map_err(|e| Fault::Final(format!("{url} is not an address ({e})")))
    }

    /// Asks for a file's commit, hash and size.
    pub(super) fn describe(&self, url: &Uri) -> Result<Described, Fault> {
        let (mut commit, mut etag, mut size) = (None, None, None);
        let described = |response: &Response<Body>, here: &Uri, next: Option<&Uri>| {
            commit = header(response, "x-repo-commit").or_else(|| commit.take());
            let named = header(response, "x-linked-etag").or_else(|| header(response, ETAG.as_str()));
            etag = named.map(|etag| bare(&etag).to_owned()).or_else(|| etag.take());
            let length = || if next.is_none() { header(response, CONTENT_LENGTH.as_str()) } else { None };
            size = header(response, "x-linked-size").or_else(length).or_else(|| size.take());
            // The store behind a hub knows nothing of commits, and may not answer this question at all.
            commit.is_some() && etag.is_some() && next.is_some_and(|next| !same_origin(here, next))
        };
        self.ask(&Method::HEAD, url, None, described)?;
        let name = |tag: Option<String>, header: &str| match tag {
            Some(tag) if is_tag(&tag) => Ok(tag),
            Some(tag) => {
                let tag: String = tag.chars().take(100).collect();
                Err(no_hub(&format!("its {header} is {tag:?}, which cannot name a file of the cache")))
            }
            None => Err(no_hub(&format!("it has no {header}"))),
        };
        let size = size.map(|size| size.trim().parse().map_err(|_| no_hub(&format!("its size is {size:?}"))));
        Ok(Described { commit: name(commit, "X-Repo-Commit")?, etag: name(etag, "ETag")?, size: size.transpose()? })
    }

    /// Asks for a file's bytes from `from` on.
    pub(super) fn get(&self, url: &Uri, from: u64, expected: &Described) -> Result<Response<Body>, Fault> {
        let mut moved = false;
        let range = (from > 0).then_some(from);
        let response = self.ask(&Method::GET, url, range, |response, _, _| {
            moved |= header(response, "x-repo-commit").is_some_and(|commit| commit != expected.commit);
            moved
        })?;
        if moved {
            return Err(Fault::Passing("the repository changed while it was asked; try again".to_owned(), None));
        }
        Ok(response)
    }

    /// One request and the redirects that it leads to. `enough` sees each answer, where it came from and where it leads,
    /// and may end the way before its end.
    fn ask(
        &self,
        method: &Method,
        url: &Uri,
        range: Option<u64>,
        mut enough: impl FnMut(&Response<Body>, &Uri, Option<&Uri>) -> bool,
    ) -> Result<Response<Body>, Fault> {
        let mut here = url.clone();
        for _ in 0..=MOST_REDIRECTS {
            let response = self.send(method, &here, range)?;
            let status = response.status().as_u16();
            let next = match (status, response.headers().get(LOCATION)) {
                (200 | 206, _) => None,
                (416, _) if range.is_some() => None,
                (304, _) | (300..=399, None) => {
                    return Err(Fault::Final(format!(
                        "the server answered {status} and leads nowhere; does HF_ENDPOINT name a hub?"
                    )));
                }
                (300..=399, Some(location)) => Some(redirect(&here, location)?),
                _ => return Err(self.refusal(&response, &here)),
            };
            if enough(&response, &here, next.as_ref()) {
                return Ok(response);
            }
            match next {
                None => return Ok(response),
                Some(next) => here = next,
            }
        }
        Err(Fault::Final(format!(
            "the server redirects more than {MOST_REDIRECTS} times; does HF_ENDPOINT name a hub?"
        )))
    }

    fn send(&self, method: &Method, url: &Uri, range: Option<u64>) -> Result<Response<Body>, Fault> {
        let mut request =
            if method == Method::HEAD { self.agent.head(url.clone()) } else { self.agent.get(url.clone()) };
        if let Some(token) = &self.token
            && same_origin(url, &self.endpoint)
        {
            request = request.header(AUTHORIZATION, token.clone());
        }
        if let Some(from) = range {
            request = request.header(RANGE, format!("bytes={from}-"));
        }
        request.call().map_err(|e| self.fault(e))
    }

    /// What an answer that is neither the file nor a redirect means, and what to do about it.
    fn refusal(&self, response: &Response<Body>, from: &Uri) -> Fault {
        let status = response.status().as_u16();
        match status {
            401 | 403 if !same_origin(from, &self.endpoint) => Fault::Final(format!(
                "access refused ({status}) by {}, to which the hub leads; try again later",
                printable(from.host().unwrap_or_default())
            )),
            401 | 403 if self.token.is_some() => Fault::Final(format!(
                "access refused ({status}); the token in HF_TOKEN is not valid, or its account has not been given access to this repository (there may be terms to accept), or there is no such repository"
            )),
            401 | 403 => Fault::Final(format!(
                "access refused ({status}); set HF_TOKEN to an access token if the repository is private or gated, and check its name: the hub answers the same for one that does not exist"
            )),
            404 | 410 => Fault::Final(format!(
                "not found ({status}); check the repository, the revision and the file's path in it"
            )),
            _ => {
                let message = format!("the server answered {status}; try again later, or another HF_ENDPOINT");
                if matches!(status, 408 | 429 | 500 | 502 | 503 | 504) {
                    let pause = header(response, RETRY_AFTER.as_str()).and_then(|pause| pause.trim().parse().ok());
                    Fault::Passing(message, pause.map(Duration::from_secs))
                } else {
                    Fault::Final(message)
                }
            }
        }
    }

    /// What went wrong below HTTP, and what to do about it.
    fn fault(&self, error: ureq::Error) -> Fault {
        let network = |what: &str| Fault::Passing(format!("{what}; check the network and HF_ENDPOINT"), None);
        match error {
            ureq::Error::Timeout(Timeout::Resolve | Timeout::Connect) => {
                network(&format!("no connection within {:?}", self.patience.connect))
            }
            ureq::Error::Timeout(Timeout::PerRead) => {
                network(&format!("nothing arrived for {:?}", self.patience.stall))
            }
            ureq::Error::Timeout(_) => network(&format!("no answer within {:?}", self.patience.answer)),
            ureq::Error::Protocol(_) | ureq::Error::Http(_) | ureq::Error::LargeResponseHeader(..) => {
                no_hub(&error.to_string())
            }
            ureq::Error::Tls(_) | ureq::Error::Rustls(_) | ureq::Error::Pem(_) => {
                Fault::Final(format!("{}; check the network and HF_ENDPOINT", printable(&error.to_string())))
            }
            other => network(&printable(&other.to_string())),
        }
    }

    /// A body that ends before its end.
    pub(super) fn broken(&self, what: &str, error: std::io::Error) -> Fault {
        let why = match ureq::Error::from(error) {
            ureq::Error::Timeout(Timeout::PerRead) => format!("nothing arrived for {:?}", self.patience.stall),
            other => printable(&other.to_string()).into_owned(),
        };
        Fault::Passing(format!("{what} ({why}); check the network"), None)
    }
}

/// An answer that no hub gives.
fn no_hub(why: &str) -> Fault {
    Fault::Final(format!("the answer is not a hub's ({}); does HF_ENDPOINT name a hub?", printable(why)))
}

/// A header's value; what is not text in it shows as such.
pub(super) fn header(response: &Response<Body>, name: &str) -> Option<String> {
    response.headers().get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
}

/// An entity tag without its quotes and its mark of weakness.
fn bare(etag: &str) -> &str {
    let etag = etag.trim();
    etag.strip_prefix("W/").unwrap_or(etag).trim_matches('"')
}

/// Whether two addresses are of one server: scheme, host and port.
fn same_origin(a: &Uri, b: &Uri) -> bool {
    let port = |uri: &Uri| uri.port_u16().or(if uri.scheme_str() == Some("https") { Some(443) } else { Some(80) });
    let host = |uri: &Uri| uri.host().map(str::to_ascii_lowercase);
    a.scheme() == b.scheme() && host(a) == host(b) && port(a) == port(b)
}

/// Where a redirect leads. One that gives up encryption is not followed.
fn redirect(here: &Uri, location: &HeaderValue) -> Result<Uri, Fault> {
    let told = String::from_utf8_lossy(location.as_bytes());
    let refuse = |why: &str| {
        let told: String = told.chars().take(200).collect();
        Err(Fault::Final(format!("the server redirects to {told:?}, {why}")))
    };
    let base = here.to_string();
    let Ok(base) = UriAbsoluteStr::new(&base) else {
        return refuse("from an address that nothing can be relative to");
    };
    let next = UriReferenceStr::new(told.trim()).ok().map(|next| next.resolve_against(base).to_string());
    let next = next.and_then(|next| next.split('#').next().unwrap_or_default().parse::<Uri>().ok());
    let Some(next) = next.filter(|next| next.host().is_some_and(|host| !host.is_empty())) else {
        return refuse("which is no address");
    };
    match (here.scheme_str(), next.scheme_str()) {
        (Some("https"), Some("http")) => refuse("which is not encrypted"),
        (_, Some("http" | "https")) => Ok(next),
        _ => refuse("which is no address of a hub"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_token_stays_with_scheme_host_and_port() {
        let uri = |text: &str| text.parse::<Uri>().unwrap();
        let hub = uri("https://huggingface.co");
        for same in ["https://huggingface.co/a", "https://HUGGINGFACE.co:443/b?c"] {
            assert!(same_origin(&hub, &uri(same)), "{same}");
        }
        for other in [
            "http://huggingface.co/a",
            "https://huggingface.co:8443/a",
            "https://huggingface.co.evil.org/",
            "https://cdn.huggingface.co/",
            "https://huggingface.co@evil.org/",
        ] {
            assert!(!same_origin(&hub, &uri(other)), "{other}");
        }
    }

    #[test]
    fn redirects_are_resolved_and_never_give_up_encryption() {
        let here: Uri = "https://hub.org/datasets/a/b/resolve/main/c.txt?x=1".parse().unwrap();
        let lead = |location: &str| redirect(&here, &HeaderValue::from_str(location).unwrap());
        for (location, expected) in [
            ("https://cdn.org/x?y=%22z%22", "https://cdn.org/x?y=%22z%22"),
            ("/api/resolve-cache/c.txt", "https://hub.org/api/resolve-cache/c.txt"),
            ("d.txt", "https://hub.org/datasets/a/b/resolve/main/d.txt"),
            ("../d.txt#part", "https://hub.org/datasets/a/b/resolve/d.txt"),
            ("//cdn.org/e", "https://cdn.org/e"),
        ] {
            assert_eq!(lead(location).unwrap().to_string(), expected);
        }
        for (location, expected) in [
            ("http://hub.org/datasets/a/b/resolve/main/c.txt", "not encrypted"),
            ("ftp://hub.org/c.txt", "no address of a hub"),
            ("https://", "no address"),
            ("http://[::1", "no address"),
            ("a b", "no address"),
        ] {
            let Err(Fault::Final(message)) = lead(location) else { panic!("{location} is followed") };
            assert!(message.contains(expected), "{message}");
        }
    }
}
