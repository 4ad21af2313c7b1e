// The server, spoken to as any client of OpenAI's protocol does: which models there are, and an answer as it is made.

/** What went wrong, in words for a reader. `status` is 0 where the server was not reached. */
export class ServerError extends Error {
  constructor(message, { status = 0 } = {}) {
    super(message);
    this.status = status;
  }
}

/** The names of the models that are served, adapters among them. */
export async function modelNames(key) {
  const response = await send("v1/models", { headers: headersOf(key) });
  const { data } = await response.json();
  return data.map((model) => model.id);
}

/**
 * Ask for an answer. Yields {text}, {finish} (why it ended) and {usage} (counts of tokens) as they come.
 * Throws ServerError, also where the stream ends before the answer does; what was yielded stays good.
 */
export async function* answer(request, key, signal) {
  const body = JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } });
  const headers = { "Content-Type": "application/json", ...headersOf(key) };
  const response = await send("v1/chat/completions", { method: "POST", headers, body, signal });
  let finished = false;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = read(data);
    if (chunk.error) throw new ServerError(sentence(chunk.error.message), { status: 500 });
    const choice = chunk.choices?.[0];
    if (choice?.delta?.content) yield { text: choice.delta.content };
    if (choice?.finish_reason) yield { finish: choice.finish_reason };
    if (chunk.usage) yield { usage: chunk.usage };
    finished ||= Boolean(choice?.finish_reason);
  }
  if (!finished) throw new ServerError("The connection broke off before the answer was complete.");
}

function headersOf(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function send(path, options) {
  let response;
  try {
    // Relative to the page: it may be served below a prefix.
    response = await fetch(new URL(path, document.baseURI), { ...options, redirect: "error" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached. It may have stopped, or the network is down.");
  }
  if (!response.ok) throw new ServerError(await explanation(response, options), { status: response.status });
  return response;
}

/** The data of server-sent events, one text for each. */
async function* events(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder(); // keeps a character that is divided over two pieces
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await piece(reader);
      rest += done ? decoder.decode() : decoder.decode(value, { stream: true });
      const lines = rest.split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => null); // it has ended already, or nobody listens any more
  }
}

async function piece(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The connection broke off before the answer was complete.");
  }
}

function read(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new ServerError("The server sent something that is not an answer.");
  }
}

// -- errors in words -------------------------------------------------------------------------------------------------

async function explanation(response, { headers }) {
  const told = await messageOf(response);
  const wait = Number(response.headers.get("Retry-After"));
  const when = wait > 0 ? `in ${wait} s` : "in a moment";
  switch (response.status) {
    // The server's own words are of headers.
    case 401: return headers.Authorization ? "The server does not accept this key." : "This server asks for a key.";
    case 413: return `${told ?? "This is more than the server takes."} Remove a picture or start a new chat.`;
    case 429: return `The server is busy. ${told ?? "Too many requests came at once."} Try again ${when}.`;
    case 503: return `The server is not ready. ${told ?? "It is starting or about to end."} Try again ${when}.`;
    default: return told ?? `The server answered with status ${response.status}.`;
  }
}

/** The message of an error body in OpenAI's shape; null where there is none, as from a proxy in between. */
async function messageOf(response) {
  try {
    const { error } = await response.json();
    const id = response.status >= 500 ? response.headers.get("x-request-id") : null;
    return sentence(error.message) + (id ? ` (request ${id})` : "");
  } catch {
    return null;
  }
}

function sentence(text) {
  const line = String(text ?? "").trim() || "The server failed.";
  return line[0].toUpperCase() + line.slice(1) + (/[.!?…]$/.test(line) ? "" : ".");
}
