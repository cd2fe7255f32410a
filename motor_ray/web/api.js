// The endpoint's HTTP API: requests, the key, and errors as the endpoint words them. Knows nothing of the page.

const LONGEST_PAUSE_MS = 2000;
const KEY = "motor_ray_key"; // in sessionStorage: gone when the tab is closed

/** What went wrong: the endpoint's problem JSON (RFC 9457), or the like made here. */
export class Problem extends Error {
  constructor({ title, detail = "", status = 0, request_id = null, retryAfter = null }) {
    super(detail ? `${title}: ${detail}` : title);
    Object.assign(this, { title, detail, status, requestId: request_id, retryAfter });
  }

  /** From a response that is not ok. A proxy in between may answer in another format than ours. */
  static async of(response) {
    const said = await response.json().catch(() => null);
    const seconds = Number.parseFloat(response.headers.get("Retry-After"));
    return new Problem({
      title: said?.title ?? `The endpoint answered ${response.status} ${response.statusText}`.trim(),
      detail: typeof said?.detail === "string" ? said.detail : "",
      status: response.status,
      request_id: said?.request_id ?? response.headers.get("X-Request-ID"),
      retryAfter: Number.isFinite(seconds) ? seconds : null,
    });
  }
}

/** Relative to the page, so that the endpoint may stand behind a proxy that gives it a prefix. */
export function address(path, query = {}) {
  const url = new URL(path, document.baseURI);
  for (const [name, value] of Object.entries(query)) {
    if (value !== null && value !== undefined && value !== "") url.searchParams.set(name, value);
  }
  return url;
}

export class Api {
  /** `askForKey(refused)` resolves to a key, or to null if the person has none. */
  constructor(askForKey) {
    this.askForKey = askForKey;
    this.asking = null;
  }

  model(name, signal) {
    return this.#json("v1/model", { query: { model: name }, signal });
  }

  /** What is on one slice: `file` is a JPEG, PNG or TIFF. */
  async slice(file, query, signal, onUpload) {
    return (await this.#upload(address("v1/slices", query), file, signal, onUpload)).json();
  }

  /** Queue a tomogram: `what` is an MRC file, or the URI of one that the endpoint can read. */
  async tomogram(what, query, signal, onUpload) {
    if (typeof what !== "string") {
      const url = address("v1/tomograms", { ...query, name: what.name.slice(0, 200) });
      return (await this.#upload(url, what, signal, onUpload)).json();
    }
    const url = address("v1/tomograms", query);
    const headers = { "Content-Type": "application/json" };
    const body = JSON.stringify({ uri: what });
    return (await this.#send((key) => reach(url, { method: "POST", headers: { ...headers, ...key }, body, signal }))).json();
  }

  /** Ask for a tomogram until it is done or failed; `onUpdate` gets each answer. Resolves to the last one. */
  async follow(tomogram, signal, onUpdate) {
    let [pause, silent] = [250, 0];
    onUpdate(tomogram);
    while (tomogram.status === "queued" || tomogram.status === "running") {
      await sleep(pause, signal);
      pause = Math.min(pause * 1.5, LONGEST_PAUSE_MS);
      try {
        tomogram = await this.#json(`v1/tomograms/${tomogram.id}`, { signal });
        silent = 0;
        onUpdate(tomogram);
      } catch (error) {
        // The work goes on without us, so a busy endpoint or a short break of the line is waited out.
        const passing = error instanceof Problem && [0, 429, 502, 503, 504].includes(error.status);
        if (!passing || ++silent > 8) throw error;
        pause = error.retryAfter === null ? LONGEST_PAUSE_MS : error.retryAfter * 1000;
      }
    }
    return tomogram;
  }

  /** The motors as the bytes of a file, `format` is csv or star. */
  async motors(id, format, threshold, signal) {
    const url = address(`v1/tomograms/${id}/motors.${format}`, { threshold });
    return (await this.#send((headers) => reach(url, { headers, signal }))).blob();
  }

  forget(id) {
    return this.#send((headers) => reach(address(`v1/tomograms/${id}`), { method: "DELETE", headers }));
  }

  async #json(path, { query, signal }) {
    return (await this.#send((headers) => reach(address(path, query), { headers, signal }))).json();
  }

  #upload(url, file, signal, onUpload) {
    return this.#send((headers) => upload(url, file, headers, signal, onUpload));
  }

  /** The response of `attempt(headers)`; where the endpoint wants a key, ask for it and try again. */
  async #send(attempt) {
    for (;;) {
      const key = sessionStorage.getItem(KEY);
      const response = await attempt(key ? { Authorization: `Bearer ${key}` } : {});
      if (response.ok) return response;
      const problem = await Problem.of(response);
      if (response.status !== 401) throw problem;
      // Another request may have learnt a newer key while this one was under way.
      if (key === sessionStorage.getItem(KEY) && !(await this.#learnKey(key !== null))) throw problem;
    }
  }

  async #learnKey(refused) {
    this.asking ??= this.askForKey(refused).finally(() => (this.asking = null));
    const key = await this.asking;
    if (key !== null) sessionStorage.setItem(KEY, key);
    return key !== null;
  }
}

const unreachable = () =>
  new Problem({ title: "The endpoint does not answer", detail: "Check the connection and that it is running, then try again." });

/** fetch, whose errors other than an abort say nothing that helps. */
async function reach(url, options) {
  try {
    return await fetch(url, options);
  } catch (error) {
    throw error.name === "AbortError" ? error : unreachable();
  }
}

/** POST `file`; XMLHttpRequest because fetch does not tell how much of a body has gone out. */
function upload(url, file, headers, signal, onUpload) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    const stop = () => request.abort();
    request.open("POST", url);
    request.setRequestHeader("Content-Type", "application/octet-stream");
    for (const [name, value] of Object.entries(headers)) request.setRequestHeader(name, value);
    request.responseType = "blob";
    request.upload.onprogress = (event) => onUpload(event.loaded, event.total);
    request.onload = () => resolve(asResponse(request));
    request.onerror = () => reject(unreachable());
    request.onabort = () => reject(new DOMException("stopped", "AbortError"));
    request.onloadend = () => signal.removeEventListener("abort", stop);
    signal.addEventListener("abort", stop);
    if (signal.aborted) stop();
    else request.send(file);
  });
}

/** As fetch would have it, so that both are read by the same code. */
function asResponse(request) {
  const lines = request.getAllResponseHeaders().trim().split("\r\n").filter(Boolean);
  const headers = lines.map((line) => [line.slice(0, line.indexOf(":")), line.slice(line.indexOf(":") + 1).trim()]);
  return new Response(request.response, { status: request.status, statusText: request.statusText, headers });
}

function sleep(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => {
      clearTimeout(timer);
      reject(new DOMException("stopped", "AbortError"));
    };
    const timer = setTimeout(() => {
      signal.removeEventListener("abort", stop);
      resolve();
    }, milliseconds);
    if (signal.aborted) stop();
    else signal.addEventListener("abort", stop);
  });
}
